"""Sampling weights by the batch from which they hold, in memory that DataLoader workers share.

The main process appends, workers look up. Every process records the next batch that it will
draw, so that weights for a batch already drawn are refused. There is no lock: a change has to be
announced for a batch that no worker has been asked for, and a late one is detected afterwards.

Shape letters: C changes, D domains.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ddk_cache import InputError
from ddk_train.data.mixture import Floats

CHANGES = 2**14
"""Most changes of the weights in one run."""

READERS = 2**10
"""Places for the progress of readers: the main process, then its workers."""

NEVER = np.iinfo(np.int64).max

Change = tuple[int, Floats]
"""The batch from which weights hold, and the (D) weights."""


class Schedule:
    """A short history of weights, sorted by batch."""

    def __init__(self, weights: Floats) -> None:
        self._first = torch.full((CHANGES,), NEVER, dtype=torch.int64).share_memory_()
        shape = (CHANGES, len(weights))
        self._weights = torch.zeros(shape, dtype=torch.float64).share_memory_()
        self._next = torch.zeros(READERS, dtype=torch.int64).share_memory_()
        self._own: list[Change] = []
        self.replace([(0, weights)])

    def at(self, batch: int) -> Floats:
        """Return the (D) weights of a batch."""
        return self.from_batch(batch)[0][1]

    def from_batch(self, batch: int) -> list[Change]:
        """Return the change that holds at a batch, and all later ones."""
        first = self._numbers()
        place = max(0, int(np.searchsorted(first, batch, side="right")) - 1)
        last = int(np.searchsorted(first, NEVER))
        weights: Floats = self._weights.numpy()
        shared = [(int(first[n]), weights[n].copy()) for n in range(place, last)]
        # What a worker loaded itself takes precedence over the shared change of the same batch.
        merged = dict(shared) | {n: w for n, w in self._own if n >= shared[0][0]}
        changes = sorted(merged.items(), key=lambda change: change[0])
        held = [n for n, _ in changes if n <= batch]
        return changes[max(0, len(held) - 1) :]

    def replace(self, changes: list[Change], batch: int = 0) -> None:
        """Start at a batch with these changes; for the main process."""
        self.begin(None, batch)
        self._first.fill_(NEVER)
        for place, (batch, weights) in enumerate(changes):
            self._weights[place] = torch.from_numpy(weights)
            self._first[place] = batch

    def load_own(self, changes: list[Change]) -> None:
        """Add changes in this process alone; for a worker that resumes by its own state."""
        self._own = changes

    def append(self, weights: Floats, at: int | None) -> None:
        """Let weights hold from batch `at`, or without workers from the next batch.

        Raises:
            InputError: a process has drawn that batch, or workers read and `at` is missing.
        """
        progress = self._next.numpy()
        if at is None and progress[1:].any():
            raise InputError(
                "set_weights: DataLoader workers read ahead. Give at=, the number of the first "
                "batch with the new weights: batches consumed + num_workers * prefetch_factor."
            )
        drawn = int(progress.max())
        batch = drawn if at is None else at
        first = self._numbers()
        place = int(np.searchsorted(first, NEVER))
        if batch < drawn or first[place - 1] > batch:
            raise InputError(
                f"set_weights: got at={batch}, expected a batch from "
                f"{max(drawn, int(first[place - 1]))} on. With DataLoader workers, give batches "
                "consumed + num_workers * prefetch_factor."
            )
        if first[place - 1] == batch:
            place -= 1
        if place == CHANGES:
            raise InputError(f"set_weights: got more than {CHANGES:,} changes. Change less often.")
        self._weights[place] = torch.from_numpy(weights)
        self._first[place] = batch
        if int(progress.max()) > batch:
            raise InputError(f"set_weights: batch {batch} was drawn meanwhile. Give a later at=.")

    # --- progress of readers ---

    def begin(self, worker: int | None, batch: int) -> None:
        """Record that a worker, or the main process (None), starts at a batch."""
        if worker is None:
            self._next.zero_()
        else:
            self._next[0] = 0
        self.mark(worker, batch)

    def mark(self, worker: int | None, batch: int) -> None:
        """Record that all batches before this one are drawn or about to be."""
        self._next[0 if worker is None else 1 + worker] = batch

    def _numbers(self) -> npt.NDArray[np.int64]:
        numbers: npt.NDArray[np.int64] = self._first.numpy()
        return numbers
