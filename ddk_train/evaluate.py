"""How far the student is from the teacher, domain by domain, on held-out rows.

The same rows are measured each time, so that a change of the gap is a change of the student. The
teacher's loss on them is read from the cache once; the teacher itself is never needed. One pass
gives cross-entropy and KL and keeps no logits; what it cost is told with every measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ddk_cache import SPLITS, Cache, Extent, SparseTargets, rows_at
from ddk_cache.rng import key_of, permute
from ddk_train.data.mixture import Floats, Ints
from ddk_train.distributed import Processes
from ddk_train.weights import Gaps

TRAIN, VALIDATION = SPLITS

Known = Mapping[str, Mapping[str, Sequence[Extent]]]
"""The rows that a run knows, by domain and split."""

Measure = Callable[[torch.Tensor, torch.Tensor, SparseTargets[torch.Tensor]], torch.Tensor]
"""(B, S+1) tokens, (B, S) mask, (B, S, K) targets → (2) sums over counted positions of the
student's cross-entropy and of KL(teacher ‖ student), nats."""


@dataclass(frozen=True)
class Measured:
    """What one measurement found, and what it cost."""

    gaps: Gaps
    kl: Floats
    """(D) KL(teacher ‖ student) on the stored targets, nats a position; NaN where no row is held
    out. Of sampled targets it is too large by a constant of the rows measured: what was drawn is
    surer than the teacher. Its changes are right."""
    seconds: Floats
    """(D) spent."""


class GapMeter:
    """A fixed sample of held-out rows of every domain, and the teacher's loss on it."""

    def __init__(
        self, cache: Cache, extents: Known, rows: int, micro: int, processes: Processes
    ) -> None:
        self.cache, self.micro, self.processes = cache, micro, processes
        self.rows: dict[str, Ints] = {
            name: sample(name, splits[VALIDATION], rows) for name, splits in extents.items()
        }
        self.teacher_loss: Floats = np.array([self._teacher(name) for name in self.rows])
        train_rows = [sum(e.rows for e in splits[TRAIN]) for splits in extents.values()]
        self.sizes: Floats = np.array(train_rows, np.float64)

    def measure(self, measure: Measure) -> Measured:
        """Return the gaps of a student; the processes share the rows."""
        found = np.array([self._student(name, measure) for name in self.rows])
        loss, kl, seconds = found.T
        return Measured(Gaps(loss, self.teacher_loss, self.sizes), kl, seconds)

    def _teacher(self, name: str) -> float:
        if not len(self.rows[name]):
            return float("nan")
        rows = self.cache.read(name, VALIDATION, self.rows[name])
        loss = -rows.label_logprob[rows.loss_mask].mean(dtype=np.float64)
        return float(loss)

    def _student(self, name: str, measure: Measure) -> tuple[float, float, float]:
        """Return the means of cross-entropy and KL over counted positions, and seconds."""
        began, device = time.perf_counter(), self.processes.device
        total = torch.zeros(3, dtype=torch.float64, device=device)
        for first in range(0, len(self.rows[name]), self.micro)[self.processes.share]:
            numbers = self.rows[name][first : first + self.micro]
            rows = self.cache.read(name, VALIDATION, numbers)
            tokens = torch.from_numpy(rows.tokens).to(device)
            mask = torch.from_numpy(rows.loss_mask).to(device)
            kept = (rows.targets.ids, rows.targets.probs, rows.targets.tail)
            targets = SparseTargets(*(torch.from_numpy(array).to(device) for array in kept))
            total[:2] += measure(tokens, mask, targets)
            total[2] += mask.sum()
        *sums, positions = self.processes.total(total).tolist()
        loss, kl = (x / positions if positions else float("nan") for x in sums)
        return loss, kl, time.perf_counter() - began


def sample(name: str, extents: Sequence[Extent], count: int) -> Ints:
    """Return the numbers of at most `count` rows of a domain, ascending, spread by a permutation.

    The choice depends on the rows alone, so that all runs from a cache measure the same.
    """
    rows = sum(extent.rows for extent in extents)
    if rows <= count:
        return rows_at(extents, np.arange(rows))
    chosen = permute(np.arange(count), rows, key_of("eval", name))
    return rows_at(extents, np.sort(chosen))
