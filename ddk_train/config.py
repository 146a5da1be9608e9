"""Every setting of a training run, its reason and its check.

One flat dataclass: what is written to the run directory is all there is, and a resumed run is
compared with it field by field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddk_cache import DDKError, InputError
from ddk_cache.errors import unknown

PRECISIONS = ("auto", "bf16", "fp32")
SCHEDULES = ("cosine", "wsd")
OPTIMIZERS = ("adamw", "adamw_8bit")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run. Only `cache`, `run` and `student` have no default."""

    cache: str
    """Path of the cache."""
    run: str
    """Path of the run directory, new or to be resumed."""
    student: str
    """A model directory, a hub id, or the config.json of a fresh student."""

    shard_cache: str = ""
    """A local directory that keeps whole shards of a cache in an object store."""
    shard_cache_size: str = "50G"
    """Bytes that it may take, for example 500M or 50G."""

    weighting: str = "ddk"
    """How domains are weighted: a name in `ddk_train.weights.RULES`."""
    alpha: float = 0.5
    """Smoothing of Eq. 2 and of `excess`: the share that follows the gaps; the rest is even."""
    weights: str = ""
    """Of `fixed`, for every domain: code=0.5,web=0.3,… Only their ratios count."""
    interval: int = 1000
    """Steps between two measurements of the gaps. The paper's best of 50 … 2,000."""
    eval_rows: int = 500
    """Held-out rows of each domain on which gaps are measured, as in the paper."""
    forgetting: float = 0.05
    """Nats that a domain's held-out loss may rise above its best before a warning. On 500 rows of
    1,024 tokens the same student's loss is known to about 0.005."""

    gamma: float = 0.2
    """Weight of the divergence from the teacher beside the cross-entropy; the paper's best."""
    loss: str = "forward_kl"
    """The divergence: a name in `ddk_train.loss.divergences.LOSSES`."""
    temperature: float = 1.0
    """Of teacher and student in the divergence, which gets T² times the weight; the cache has to
    declare one that is not 1."""

    steps: int = 30_000
    """Optimizer steps."""
    rows: int = 32
    """Rows in a step."""
    micro_rows: int = 0
    """Rows in one forward pass; 0 is all of a step. Gradients add up over a step."""
    lr: float = 3e-5
    """Highest learning rate."""
    min_lr: float = 0.1
    """Where the schedule ends, as a share of `lr`."""
    warmup: int = 1000
    """Steps over which the learning rate rises; at most a tenth of the run."""
    schedule: str = "cosine"
    """How the learning rate falls after the warm-up: along a cosine, or only at the end (wsd)."""
    decay: float = 0.2
    """Share of the run over which `wsd` falls."""
    optimizer: str = "adamw"
    """AdamW with float32 states, or with states of 8 bits (CUDA and bitsandbytes)."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices (not of vectors: norms and biases)."""
    beta2: float = 0.95
    """AdamW's second moment. Its first is 0.9."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    lora_rank: int = 0
    """Rank of a LoRA adapter, which is trained in place of the student; 0 is none."""
    keep_adapter: bool = False
    """Leave the adapter by itself at the end, instead of merged into the student."""

    seed: int = 0
    """Of the data order and of a fresh student's weights."""
    device: str = "auto"
    """auto, cpu, cuda, …"""
    precision: str = "auto"
    """bf16 computes in bfloat16 with float32 weights; auto is bf16 where CUDA has it."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile the student with torch.compile."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 is the interval."""
    keep: int = 2
    """Newest checkpoints kept; the one with the lowest held-out loss is kept beside them."""
    patience: int = 0
    """Measurements without a lower mean held-out loss after which the run ends; its student is
    then the best one. 0 goes on to the last step and takes the last."""
    new_rows: bool = False
    """When resumed from a cache that has grown: take the new rows too."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    report_to: str = ""
    """Trackers that accelerate knows, joined by commas: tensorboard, wandb, …"""

    def __post_init__(self) -> None:
        from ddk_train.weights import RULES, parse_weights

        for name, words in (
            ("weighting", RULES),
            ("precision", PRECISIONS),
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
        ):
            if getattr(self, name) not in words:
                raise InputError(unknown(name, getattr(self, name), words))
        if (self.weighting == "fixed") != bool(parse_weights(self.weights)):
            raise InputError("--weights and --weighting fixed belong together: give both or none.")
        for name in ("interval", "eval_rows", "steps", "rows", "keep", "log_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            *("micro_rows", "warmup", "checkpoint_every", "gamma", "weight_decay", "seed"),
            *("lora_rank", "patience", "forgetting"),
        ):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("lr", "clip", "temperature"):
            self._check(name, 0 < getattr(self, name) < math.inf, "above 0")
        for name in ("alpha", "min_lr"):
            self._check(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self._check("beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        self._check("decay", 0 < self.decay <= 1, "above 0 and at most 1")

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise InputError(f"{name} has to be {wanted}, not {getattr(self, name)}.")

    @property
    def micro(self) -> int:
        """Return the rows of one forward pass."""
        return min(self.micro_rows or self.rows, self.rows)

    @property
    def warmup_steps(self) -> int:
        """Return the steps of warm-up, capped so that a short run still reaches its rate."""
        return min(self.warmup, self.steps // 10)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Read what `to_json` wrote."""
        try:
            return cls(**values)
        except TypeError as error:
            raise DDKError(f"the config of this run is of another version: {error}") from error
