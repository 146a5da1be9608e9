"""Every setting of a training run, its reason and its check.

One flat dataclass: what is written to the run directory is all there is, a resumed run is compared
with it field by field, and the options of `ddk-train run` and their help are made from it. The
price is that a library user meets the options of the trainer and of the optimizer in one list.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from ddk_cache import InputError
from ddk_cache.errors import unknown
from ddk_train.weights.given import parse_domains, parse_weights
from ddk_train.weights.rules import ALPHA, RULES

CHOICES = {
    "weighting": tuple(RULES),
    "precision": ("auto", "bf16", "fp32"),
    "schedule": ("cosine", "wsd"),
    "optimizer": ("adamw", "adamw_8bit"),
    "pairs": ("none", "dpkd", "plad"),
}
"""The words that a setting takes, where they are a short list."""

PATHS = ("cache", "run", "student", "shard_cache")
"""Settings that may begin with `~`."""

MOST_SEED = 2**63 - 1
"""Seeds are 64-bit integers; each process adds its rank to the seed."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run. Only `cache`, `run` and `student` have no default."""

    cache: str
    """Path or URL of the cache."""
    run: str
    """Path of the run directory, new or to be resumed."""
    student: str
    """Model directory, hub id, or the config.json of a fresh student."""
    trust_remote_code: bool = False
    """Run Python code that comes with the student or its tokenizer."""

    shard_cache: str = ""
    """Local directory that keeps whole shards of a cache at a URL."""
    shard_cache_size: str = "50G"
    """Most bytes in that directory, for example 500M or 50G."""

    weighting: str = "excess"
    """Rule that turns gaps into sampling weights; ddk is the paper's."""
    alpha: float | None = None
    """Share of the weights that follows the gaps (rules ddk, excess and gain); the rest is even. By
    default 0.5, for gain 0.75."""
    rho: float = 0.5
    """Share of `alpha` that follows progress instead of the gap (rule gain)."""
    window: int = 3
    """Measurements over which progress is taken (rule gain)."""
    shrink: bool = False
    """Shrink progress towards its mean by its standard error (rule gain)."""
    tilt: float = 0.0
    """Tilt towards the worst gap: gaps count by exp(`tilt` · gap) more (rules excess and gain)."""
    repetition_guard: bool = False
    """Let gaps of domains that were repeated more than four times count less (rules excess and
    gain)."""
    domains: str = ""
    """Domains to train on: code,web. Others are only measured. By default those in `weights`, or
    all."""
    weights: str = ""
    """Weights for `weighting` fixed by domain: code=0.5,web=0.3,… Only ratios count."""
    interval: int = 1000
    """Steps between two measurements of the gaps; the paper's best of 50 to 2,000."""
    eval_rows: int = 500
    """Held-out rows per domain on which gaps are measured, as in the paper."""
    forgetting: float = 0.05
    """Rise of a domain's held-out loss above its lowest that is reported as a warning (nats). On
    500 rows of 1,024 tokens a loss is known to about 0.005."""

    gamma: float = 0.2
    """Weight of the divergence from the teacher, added to the cross-entropy."""
    loss: str = "forward_kl"
    """Divergence from the teacher: forward_kl, reverse_kl, jsd:BETA, skew_kl:ALPHA or dpkd:BETA."""
    temperature: float = 1.0
    """Temperature of teacher and student in the divergence, which is scaled by its square. A value
    other than 1 must be one that the cache was built for."""

    pairs: str = "none"
    """Loss on pairs of responses ('ddk-cache pair'): dpkd compares the student with the teacher on
    both responses, plad ranks them by the student's likelihood."""
    pair_rows: int = 16
    """Rows of pairs per step, over all processes; a pair is two rows."""
    rows_weight: float = 1.0
    """Weight of the loss on rows, added to that on pairs; 0 reads no rows."""
    beta: float = 0.1
    """Scale of the implicit reward of `pairs` dpkd."""
    margin: float = 1.0
    """Margin of `pairs` plad (nats per token)."""
    per_token: bool = True
    """Divide the log-probability of a response by its length in the loss on pairs."""

    steps: int = 30_000
    """Optimizer steps."""
    rows: int = 32
    """Rows per step, over all processes."""
    micro_rows: int = 0
    """Rows per forward pass; gradients accumulate over a step. 0 takes all rows of a step."""
    lr: float = 3e-5
    """Peak learning rate."""
    min_lr: float = 0.1
    """Final learning rate, as a share of `lr`."""
    warmup: int = 1000
    """Steps over which the learning rate rises; at most a tenth of the run."""
    schedule: str = "cosine"
    """How the learning rate falls after the warm-up: along a cosine, or only at the end (wsd)."""
    decay: float = 0.2
    """Share of the run over which `schedule` wsd falls."""
    optimizer: str = "adamw"
    """AdamW with float32 states, or with 8-bit states, which need bitsandbytes."""
    weight_decay: float = 0.1
    """AdamW's weight decay of matrices; vectors (norms, biases) do not decay."""
    beta2: float = 0.95
    """AdamW's β₂; its β₁ is 0.9."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    lora_rank: int = 0
    """Rank of a LoRA adapter, which is trained instead of the student's weights; 0 trains these."""
    keep_adapter: bool = False
    """Save the adapter by itself at the end, instead of merging it into the student."""

    seed: int = 0
    """Seed of the data order and of a fresh student's weights."""
    device: str = "auto"
    """Device to train on: auto, cpu, cuda or cuda:N. auto is CUDA where there is a GPU."""
    precision: str = "auto"
    """Type of computation; weights are float32 in each. auto is bf16 where CUDA supports it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the student with torch.compile."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 takes `interval`."""
    keep: int = 2
    """Newest checkpoints to keep; the one with the lowest held-out loss is kept as well."""
    patience: int = 0
    """Measurements without a lower mean held-out loss after which the run ends and its best student
    is saved. 0 runs to the last step and saves the last student."""
    new_rows: bool = False
    """When resuming from a cache that has grown, train on its new rows too."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    report_to: str = ""
    """Trackers to log to besides metrics.jsonl, separated by commas, for example tensorboard."""

    def __post_init__(self) -> None:
        """Raise InputError where a setting has another type or a value that makes no sense."""
        self._check_types()
        for name in PATHS:
            object.__setattr__(self, name, _expanded(getattr(self, name)))
        for name, words in CHOICES.items():
            if getattr(self, name) not in words:
                raise InputError(unknown(name, getattr(self, name), words))
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise InputError(unknown("device", self.device, ("auto", "cpu", "cuda", "cuda:N")))
        if (self.weighting == "fixed") != bool(parse_weights(self.weights)):
            raise InputError(
                "--weights and --weighting fixed belong together: give both or neither."
            )
        if self.alpha is None:
            object.__setattr__(self, "alpha", ALPHA.get(self.weighting, 0.5))
        parse_domains(self.domains)
        for name in ("interval", "eval_rows", "window", "steps", "rows", "keep", "log_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            *("micro_rows", "warmup", "checkpoint_every", "gamma", "weight_decay"),
            *("lora_rank", "patience", "forgetting", "tilt"),
        ):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("rows_weight", "margin"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        self._check("pair_rows", self.pair_rows >= 2 and self.pair_rows % 2 == 0, "even, 2 or more")
        for name in ("lr", "clip", "temperature", "beta"):
            self._check(name, 0 < getattr(self, name) < math.inf, "above 0")
        for name in ("alpha", "rho", "min_lr"):
            self._check(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self._check("beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        self._check("decay", 0 < self.decay <= 1, "above 0 and at most 1")
        self._check("seed", 0 <= self.seed <= MOST_SEED, "between 0 and 2**63 - 1")
        self._check_names()

    def _check_types(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), get_args(kind) or (kind,)
            whole = type(value) is int and float in kinds
            if type(value) not in kinds and not whole:
                raise InputError(
                    f"{name}: got {value!r}, expected a value of type {kinds[0].__name__}."
                )

    def _check_names(self) -> None:
        """Check names whose lists belong to other modules, some of which import torch."""
        from ddk_cache import parse_size

        parse_size(self.shard_cache_size)
        if self.loss not in ("forward_kl", "reverse_kl"):
            from ddk_train.loss.divergences import divergence

            divergence(self.loss)
        if self.report_to:
            from ddk_train.distributed import check_trackers

            check_trackers(self.report_to)

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise InputError(f"{name} must be {wanted}, not {getattr(self, name)}.")

    @property
    def micro(self) -> int:
        """Return the rows of one forward pass."""
        return min(self.micro_rows or self.rows, self.rows)

    @property
    def own_rows(self) -> int:
        """Return the rows of a step besides those of pairs."""
        return 0 if self.pairs != "none" and not self.rows_weight else self.rows

    @property
    def warmup_steps(self) -> int:
        """Return the steps of warm-up, capped so that a short run still reaches its rate."""
        return min(self.warmup, self.steps // 10)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)


def _expanded(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML or JSON file, or of the config.json of a run.

    Raises:
        InputError: the file cannot be read, or holds something other than settings.
    """
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as settings: {error}") from error
    if isinstance(found, Mapping) and isinstance(found.get("settings"), Mapping):
        found = found["settings"]
    if not isinstance(found, Mapping):
        raise InputError(f"{path}: got {type(found).__name__}, expected settings by name.")
    for name, value in found.items():
        if name not in TrainConfig.__dataclass_fields__:
            known = TrainConfig.__dataclass_fields__
            raise InputError(f"{path}: {unknown('setting', str(name), known)}")
        if not isinstance(value, str | int | float):
            raise InputError(f"{path}: {name}: got {value!r}, expected text, a number or a bool.")
    return dict(found)
