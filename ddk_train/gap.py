"""How far the student is from the teacher, domain by domain, on held-out rows.

The same rows are measured each time, so that a change of the gap is a change of the student. The
teacher's loss on them is read from the cache once; the teacher itself is never needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from ddk_cache import SPLITS, Cache, Extent, rows_at
from ddk_cache.chance import key_of
from ddk_train.mixture import Floats, Ints, permute
from ddk_train.processes import Processes
from ddk_train.weights import Gaps

TRAIN, HELD_OUT = SPLITS

Known = Mapping[str, Mapping[str, Sequence[Extent]]]
"""The rows that a run knows, by domain and split."""

CrossEntropy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(B, S+1) tokens, (B, S) mask → sum of the student's cross-entropy over counted positions."""


class GapMeter:
    """A fixed sample of held-out rows of every domain, and the teacher's loss on it."""

    def __init__(
        self, cache: Cache, extents: Known, rows: int, micro: int, processes: Processes
    ) -> None:
        self.cache, self.micro, self.processes = cache, micro, processes
        self.rows: dict[str, Ints] = {
            name: sample(name, splits[HELD_OUT], rows) for name, splits in extents.items()
        }
        self.teacher_loss: Floats = np.array([self._teacher(name) for name in self.rows])
        train_rows = [sum(e.rows for e in splits[TRAIN]) for splits in extents.values()]
        self.sizes: Floats = np.array(train_rows, np.float64)

    def measure(self, cross_entropy: CrossEntropy) -> Gaps:
        """Return the gaps of a student; the processes share the rows."""
        losses = [self._student(name, cross_entropy) for name in self.rows]
        return Gaps(np.array(losses), self.teacher_loss, self.sizes)

    def _teacher(self, name: str) -> float:
        if not len(self.rows[name]):
            return float("nan")
        rows = self.cache.read(name, HELD_OUT, self.rows[name])
        loss = -rows.label_logprob[rows.loss_mask].mean(dtype=np.float64)
        return float(loss)

    def _student(self, name: str, cross_entropy: CrossEntropy) -> float:
        """Return the mean cross-entropy over counted positions, nats."""
        device = self.processes.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for first in range(0, len(self.rows[name]), self.micro)[self.processes.share]:
            numbers = self.rows[name][first : first + self.micro]
            rows = self.cache.read_stored(name, HELD_OUT, numbers, ("tokens", "loss_mask"))
            tokens = torch.from_numpy(rows["tokens"]).to(device).long()
            mask = torch.from_numpy(rows["loss_mask"]).to(device).bool()
            total += torch.stack([cross_entropy(tokens, mask), mask.sum()])
        loss, positions = self.processes.total(total).tolist()
        return loss / positions if positions else float("nan")


def sample(name: str, extents: Sequence[Extent], count: int) -> Ints:
    """Return the numbers of at most `count` rows of a domain, ascending, spread by a permutation.

    The choice depends on the rows alone, so that all runs from a cache measure the same.
    """
    rows = sum(extent.rows for extent in extents)
    if rows <= count:
        return rows_at(extents, np.arange(rows))
    chosen = permute(np.arange(count), rows, key_of("eval", name))
    return rows_at(extents, np.sort(chosen))
