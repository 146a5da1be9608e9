"""Train a student from a cache: one step, one loop, save and restore; read it from the top.

The teacher is not here: its word is in the cache. Every `interval` steps the gap of each domain is
measured and the weights move; between two measurements the loop does nothing but draw, forward,
backward and step. A run is a function of its settings: stopped anywhere, it goes on from its last
checkpoint and ends with the same student.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from ddk_cache import (
    SPLITS,
    DDKError,
    SparseTargets,
    open_cache,
)
from ddk_cache.console import Progress, say
from ddk_train.config import TrainConfig
from ddk_train.gap import GapMeter
from ddk_train.identity import IDENTITY, check_identity, identity, known_rows, provenance
from ddk_train.loader import Batch, Loader
from ddk_train.losses import ce_and_kl, within
from ddk_train.mixture import Floats, Mixture
from ddk_train.run import Run
from ddk_train.student import load_student, save_student
from ddk_train.weights import Gaps, proportional, update

TRAIN = SPLITS[0]

LiveTargets = Callable[[torch.Tensor], SparseTargets[torch.Tensor]]
"""(B, S+1) tokens → (B, S, K): the teacher in the loop, to compare with."""


@dataclass
class State:
    """What changes during a run beside weights and optimizer; plain JSON in a checkpoint."""

    domains: list[str]
    mixture: dict[str, Any]
    seen: dict[str, int] = field(default_factory=dict)
    """Rows drawn of each domain."""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    measured: int = -1
    """Step of the last measurement."""
    log_factor: list[str] | None = None
    """(D) log r of the weighting rule, exact hexadecimal floats."""
    weights: list[str] = field(default_factory=list)
    """(D) sampling weights in force, likewise."""

    def __post_init__(self) -> None:
        self.seen = self.seen or dict.fromkeys(self.domains, 0)


def exact(values: Floats) -> list[str]:
    """Return floats as text that gives the same bits back."""
    return [float(value).hex() for value in values]


def floats(texts: list[str]) -> Floats:
    """Read what `exact` wrote."""
    return np.array([float.fromhex(text) for text in texts])


def train(config: TrainConfig, *, live: LiveTargets | None = None) -> Run:
    """Train a student; go on where an earlier call with the same run directory stopped.

    `live` replaces the cached targets by what it returns, for comparing with a live teacher.

    Raises:
        DDKError: see its kinds; the message says what to do.
    """
    trainer = Trainer(config, live)
    with stop_requests() as stop, Progress("training", config.steps, "steps") as progress:
        progress.advance(trainer.state.step, "resumed" if trainer.state.step else "")
        while trainer.state.step < config.steps:
            trainer.measure()
            for batch in trainer.until_boundary():
                metrics = trainer.step(batch)
                note = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s"
                progress.advance(1, note)
                if stop.requested:
                    break
            if stop.requested:
                trainer.save()
                raise DDKError(
                    f"stopped after step {trainer.state.step} of {config.steps}. Run the same "
                    "command again to go on."
                )
            if trainer.state.step % trainer.checkpoint_every == 0:
                trainer.save()
        trainer.measure()
    save_student(trainer.student, trainer.cache, trainer.run.student, trainer.identity)
    return trainer.run


class Trainer:
    """A student, its data and its run directory."""

    def __init__(self, config: TrainConfig, live: LiveTargets | None) -> None:
        from ddk_cache.teacher import pick_device

        self.config, self.live = config, live
        self.device = pick_device(config.device)
        self.cache = open_cache(
            config.cache,
            shard_cache=config.shard_cache,
            shard_cache_size=config.shard_cache_size,
        )
        self.run = Run(Path(config.run))
        student = load_student(config.student, self.cache, config.seed)
        known = self.run.open(config, provenance(self.cache, student))
        rows = known_rows(self.cache, known["known_rows"])
        self.student = student.to(self.device).train()
        self.optimizer = optimizer(self.student, config)
        cuda_bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.bf16 = {"bf16": True, "fp32": False, "auto": cuda_bf16}[config.precision]
        self.domains = sorted(rows)
        self.meter = GapMeter(self.cache, rows, config.eval_rows, config.micro, self.device)
        self.mixture = Mixture(
            {name: rows[name][TRAIN] for name in self.domains},
            chunk_rows=self.cache.spec.chunk_rows,
            rows=config.rows,
            seed=config.seed,
        )
        self.loader = Loader(self.cache, self.mixture, self.device)
        self.checkpoint_every = config.checkpoint_every or config.interval
        self.identity = identity(self.cache, config.student)
        self.state = State(self.domains, self.mixture.state_dict())
        self.restore()

    # --- one step ---

    def step(self, batch: Batch) -> dict[str, float]:
        """Take one optimizer step and return its metrics."""
        began = time.perf_counter()
        rate = learning_rate(self.config, self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        positions = int(batch.loss_mask.sum())
        ce = kl = 0.0
        for micro in batch.micro(self.config.micro):
            ce_sum, kl_sum = self.losses(micro)
            ((ce_sum + self.config.gamma * kl_sum) / positions).backward()
            ce += ce_sum.item() / positions
            kl += kl_sum.item() / positions
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip).item()
        loss = ce + self.config.gamma * kl
        if not math.isfinite(loss + norm):
            raise DDKError(self._not_finite(batch))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._count(
            batch, began, positions, loss=loss, ce=ce, kl=kl, lr=rate, grad_norm=norm
        )

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of cross-entropy and KL over the counted positions of a batch."""
        targets = self.live(batch.tokens) if self.live else batch.targets
        mask = batch.loss_mask
        logits_PV = self.forward(batch.tokens[:, :-1])[mask]
        kept = SparseTargets(targets.ids[mask], targets.probs[mask], targets.tail[mask])
        if logits_PV.shape[-1] < self.cache.spec.vocab_size:
            logits_PV, kept = within(logits_PV, kept)
        ce_P, kl_P = ce_and_kl(logits_PV, batch.tokens[:, 1:][mask], kept)
        return ce_P.sum(), kl_P.sum()

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Return the student's logits."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits: torch.Tensor = self.student(input_ids=tokens_BS, use_cache=False).logits
        return logits

    def _count(
        self, batch: Batch, began: float, positions: int, **metrics: float
    ) -> dict[str, float]:
        state = self.state
        state.mixture = batch.state
        state.step += 1
        state.tokens += positions
        seconds = time.perf_counter() - began + batch.wait
        state.seconds += seconds
        for number, rows in enumerate(np.bincount(batch.draw.domain).tolist()):
            state.seen[self.domains[number]] += rows
        metrics |= {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "tokens_per_second": positions / seconds,
            "wait": batch.wait / seconds,
        }
        if state.step % self.config.log_every == 0 or state.step == 1:
            self.run.log(metrics)
        return metrics

    def _not_finite(self, batch: Batch) -> str:
        names = self.domains
        rows = "; ".join(
            f"domain {names[n]!r}, rows {batch.draw.row[batch.draw.domain == n].tolist()}"
            for n in np.unique(batch.draw.domain)
        )
        saved = self.run.checkpoints()
        last = (
            f"the last checkpoint is step {saved[-1][0]}" if saved else "no checkpoint exists yet"
        )
        return (
            f"loss or gradient is not finite at step {self.state.step + 1} ({rows}). Nothing was "
            f"updated; {last}. A lower --lr may help."
        )

    # --- intervals ---

    def until_boundary(self) -> Iterator[Batch]:
        """Yield batches up to the next measurement, checkpoint or the end."""
        step = self.state.step
        borders = [(step // n + 1) * n for n in (self.config.interval, self.checkpoint_every)]
        end = min(*borders, self.config.steps)
        return self.loader.batches(floats(self.state.weights), end - step)

    def measure(self) -> None:
        """At a measurement's step: gaps → weights → history."""
        state, config = self.state, self.config
        due = state.step % config.interval == 0 or state.step == config.steps
        if state.weights and (not due or state.measured == state.step):
            return
        self.student.eval()
        gaps = self.meter.measure(self.forward)
        self.student.train()
        before = floats(state.log_factor) if state.log_factor else None
        log_factor = update(config.weighting, gaps, before, config.alpha)
        # Algorithm 1: the first interval is drawn from the whole set, in proportion to size.
        first = config.weighting == "ddk" and before is None
        log_weights = proportional(gaps, None, 0) if first else log_factor
        state.log_factor, state.weights = exact(log_factor), exact(normalised(log_weights))
        state.measured = state.step
        self._record(gaps)

    def _record(self, gaps: Gaps) -> None:
        weights, factor = floats(self.state.weights), np.exp(floats(self.state.log_factor or []))
        epochs = self.loader.epochs()
        self.run.record(
            {
                "step": self.state.step,
                "domain": name,
                "rows_seen": self.state.seen[name],
                "tokens_seen": self.state.seen[name] * self.cache.spec.seq_len,
                "epoch": epochs[n],
                "student_loss": none_if_nan(gaps.student_loss[n]),
                "teacher_loss": none_if_nan(gaps.teacher_loss[n]),
                "factor": float(factor[n]),
                "weight": float(weights[n]),
            }
            for n, name in enumerate(self.domains)
        )

    # --- save and restore ---

    def save(self) -> None:
        """Write a checkpoint: all or nothing."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        held = {"optimizer": self.optimizer.state_dict(), "random": random}
        with self.run.checkpoint(self.state.step, self.config.keep) as path:
            self.student.save_pretrained(path / "student")
            torch.save(held, path / "torch.pt")
            (path / "state.json").write_text(json.dumps(asdict(self.state), indent=1))
            (path / IDENTITY).write_text(json.dumps(self.identity, indent=1))

    def restore(self) -> None:
        """Go on from the last whole checkpoint, if there is one."""
        saved = self.run.checkpoints()
        if not saved:
            self.run.rewind(-1, -1)
            return
        path = saved[-1][1]
        check_identity(path, self.cache)
        state = json.loads((path / "state.json").read_text())
        self.state = State(**state)
        if self.state.domains != self.domains:  # the cache grew by a domain: measure at once
            seen = {name: state["seen"].get(name, 0) for name in self.domains}
            self.state = dataclasses.replace(
                self.state, domains=self.domains, seen=seen, log_factor=None, weights=[]
            )
        self.mixture.load_state_dict(self.state.mixture)
        self.student.load_state_dict(
            type(self.student).from_pretrained(path / "student", dtype=torch.float32).state_dict()
        )
        self.run.rewind(self.state.step, state["measured"])
        held = torch.load(path / "torch.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(held["optimizer"])
        torch.set_rng_state(held["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in held["random"]:
            torch.cuda.set_rng_state(held["random"]["cuda"], self.device)
        say(f"going on after step {self.state.step} of {self.config.steps}")


# --- small things the trainer is made of ----------------------------------------------------------


def optimizer(student: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves vectors (norms, biases) alone."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of a step counted from 0: linear warm-up, then a cosine to min_lr · lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    floor = config.min_lr
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def normalised(log_weights: Floats) -> Floats:
    """Return weights that sum to one to the last bit that float64 allows."""
    weights: Floats = np.exp(log_weights)
    weights /= weights.sum()
    return weights


def none_if_nan(value: float) -> float | None:
    """Return a float that Parquet and JSON readers agree on."""
    return None if math.isnan(value) else float(value)


@dataclass
class Stop:
    """Whether somebody asked the run to stop."""

    requested: bool = False

    def request(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; a second one stops at once."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        say("stopping after this step; a checkpoint will be written")


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a request to stop after the current step."""
    stop, before = Stop(), {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, stop.request)
        except ValueError:  # not the main thread: whoever runs us there stops us in its own way
            break
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
