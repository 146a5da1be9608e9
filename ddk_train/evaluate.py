"""The gap between student and teacher, domain by domain, on held-out rows.

Every measurement uses the same rows, so that a change of the gap is a change of the student. The
teacher's loss on them is in the cache and is read once; the teacher itself is not needed. Held-out
rows are decoded by the same code as training rows. One pass gives cross-entropy and KL without
storing logits; every measurement reports the seconds that it took.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddk_cache import SPLITS, TRAIN, VALIDATION, Cache, Extent, SparseTargets, open_cache, rows_at
from ddk_cache.rng import key_of, permute
from ddk_train.data.decode import Dequantizer
from ddk_train.data.mixture import Floats, Ints
from ddk_train.loss.fused import Terms
from ddk_train.loss.objective import Objective, evaluating
from ddk_train.weights.gaps import Gaps

Known = Mapping[str, Mapping[str, Sequence[Extent]]]
"""The rows in use, by domain and split."""

Measure = Callable[
    [torch.Tensor, torch.Tensor, SparseTargets[torch.Tensor], torch.Tensor | None], torch.Tensor
]
"""(B, S+1) tokens, (B, S) mask, (B, S, K) targets, and (B, S+1) positions where documents are kept
apart → (2, B) sums over the counted positions of each row of the student's cross-entropy and of
KL(teacher ‖ student), nats."""

Total = Callable[[torch.Tensor], torch.Tensor]
"""A tensor of this process → its sum over all processes."""


@dataclass(frozen=True)
class Measured(Gaps):
    """The result of one measurement, and its cost. Arrays have one entry per domain, D."""

    kl: Floats
    """(D) KL(teacher ‖ student) on the stored targets, nats per position; NaN where no row is held
    out. For sampled targets it is too large by a constant of the rows measured, because the drawn
    entries are over-confident; its changes are right."""
    seconds: Floats
    """(D) seconds spent."""
    domains: tuple[str, ...]
    """(D) names of the domains."""
    fall_error: Floats = field(kw_only=True)


class GapMeter:
    """A fixed sample of held-out rows of every domain, and the teacher's loss on it."""

    def __init__(
        self,
        cache: Cache,
        extents: Known,
        rows: int,
        micro: int,
        device: torch.device,
        *,
        share: slice = slice(None),
        total: Total = lambda value: value,
        window: int = 3,
    ) -> None:
        """Choose at most `rows` rows per domain, to be measured `micro` at a time on `device`.

        Of several processes, each measures its `share` of the pieces, and `total` adds them up.
        `window` is the number of measurements back to which `Gaps.fall_error` reaches.
        """
        self.cache, self.micro, self.device = cache, micro, device
        self.share, self.total = share, total
        self.rows: dict[str, Ints] = {
            name: sample(name, splits[VALIDATION], rows) for name, splits in extents.items()
        }
        self.teacher_loss: Floats = np.array([self._teacher(name) for name in self.rows])
        train_rows = [sum(e.rows for e in splits[TRAIN]) for splits in extents.values()]
        self.sizes: Floats = np.array(train_rows, np.float64)
        self._dequantize = Dequantizer(cache, list(self.rows), device)
        self.window = window
        self.past: dict[str, list[Floats]] = {name: [] for name in self.rows}
        """By domain, the losses (R) of its rows at the last `window` measurements, nats."""

    def measure(self, measure: Measure) -> Measured:
        """Return the gaps of a student, and remember the losses of its rows."""
        losses, kls, errors, seconds = [], [], [], []
        for n, past in enumerate(self.past.values()):
            began = time.perf_counter()
            ce_R, kl_R, positions_R = self._student(n, measure).cpu().numpy()
            positions = positions_R.sum() or np.nan
            losses.append(ce_R.sum() / positions)
            kls.append(kl_R.sum() / positions)
            errors.append(fall_error(past[0], ce_R, positions_R) if past else np.nan)
            past[:] = [*past, ce_R][-self.window :]
            seconds.append(time.perf_counter() - began)
        return Measured(
            np.array(losses),
            self.teacher_loss,
            self.sizes,
            np.array(kls),
            np.array(seconds),
            tuple(self.rows),
            fall_error=np.array(errors),
        )

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return what is remembered of the rows of each domain, and their numbers."""
        return {
            name: {
                "rows": torch.from_numpy(rows),
                "losses": [torch.from_numpy(loss_R) for loss_R in self.past[name]],
            }
            for name, rows in self.rows.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore what is remembered, for domains whose measured rows are the same as then."""
        for name, rows in self.rows.items():
            if name in state and np.array_equal(state[name]["rows"].numpy(), rows):
                self.past[name] = [loss_R.numpy() for loss_R in state[name]["losses"]]

    def _teacher(self, name: str) -> float:
        """Return the teacher's mean loss over the counted positions of a domain's sample."""
        if not len(self.rows[name]):
            return float("nan")
        arrays = ("label_logprob", "loss_mask")
        stored = self.cache.read_stored(name, VALIDATION, self.rows[name], arrays)
        loss = -self.cache.logprob.decode(stored["label_logprob"])
        return float(loss[stored["loss_mask"].astype(bool)].mean(dtype=np.float64))

    def _student(self, domain: int, measure: Measure) -> torch.Tensor:
        """Return (3, R) sums over the positions of each row: cross-entropy, KL, and their count."""
        rows = list(self.rows.values())[domain]
        found = torch.zeros((3, len(rows)), dtype=torch.float64, device=self.device)
        for first in range(0, len(rows), self.micro)[self.share]:
            part = slice(first, first + self.micro)
            row_B = rows[part]
            decoded = self._dequantize.read(VALIDATION, np.full(len(row_B), domain), row_B)
            found[:2, part] = measure(*decoded)
            found[2, part] = decoded.loss_mask.sum(1)
        return self.total(found)


def fall_error(before_R: Floats, after_R: Floats, positions_R: Floats) -> float:
    """Return the standard error of the fall of a mean loss, from the same rows before and after.

    `before_R` and `after_R` are sums of the loss over the positions of each row, nats. Rows are
    independent, the positions of one are not: so the error is that of a ratio of sums over rows.
    NaN where there are fewer than two rows.
    """
    fall_R, rows = before_R - after_R, len(before_R)
    positions = positions_R.sum()
    if rows < 2 or not positions:
        return math.nan
    apart_R = fall_R - positions_R * (fall_R.sum() / positions)
    return float(np.sqrt(rows / (rows - 1) * (apart_R**2).sum()) / positions)


def measure_gaps(
    model: Any, cache: Cache | str | Path, *, rows: int = 500, batch_rows: int = 8
) -> Measured:
    """Measure a causal language model on at most `rows` held-out rows of every domain of a cache.

    `model` is bare, with a peft adapter, or wrapped by DDP or accelerate. Where torch.distributed
    is initialized, all processes must call this; they share the rows and get the same result.

    Raises:
        DDKError: the cache cannot be opened or read; see `open_cache`.
    """
    opened = cache if isinstance(cache, Cache) else open_cache(cache)
    return measure_with(gap_meter(model, opened, rows, batch_rows), model)


def gap_meter(model: Any, cache: Cache, rows: int, batch_rows: int, window: int = 3) -> GapMeter:
    """Return a meter over all rows of a cache, on the device of a model."""
    extents = {name: {s: cache.extents(name, s) for s in SPLITS} for name in cache.domains}
    device = next(model.parameters()).device
    shared: dict[str, Any] = {}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        share = slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())
        shared = {"share": share, "total": over_processes}
    return GapMeter(cache, extents, rows, batch_rows, device, window=window, **shared)


def measure_with(meter: GapMeter, model: Any) -> Measured:
    """Measure a model in evaluation mode, and restore its mode.

    The model runs without its DDP wrapper, whose forward waits for the other processes.
    """
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model)
    with evaluating(model):
        objective = Objective(model, Terms(0.0), meter.cache.spec.vocab_size, bf16=False)
        return meter.measure(objective.measure)


def over_processes(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over the processes of torch.distributed."""
    torch.distributed.all_reduce(value)
    return value


def sample(name: str, extents: Sequence[Extent], count: int) -> Ints:
    """Return the numbers of at most `count` rows of a domain, ascending, spread by a permutation.

    The choice depends on the rows alone, so that all runs from a cache measure the same rows.
    """
    rows = sum(extent.rows for extent in extents)
    if rows <= count:
        return rows_at(extents, np.arange(rows))
    chosen = permute(np.arange(count), rows, key_of("eval", name))
    return rows_at(extents, np.sort(chosen))
