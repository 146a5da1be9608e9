"""Which rows come next: a pure function of seed, weights and step.

The number of rows per domain involves no randomness: each row goes, among the domains that are
not ahead of their weight, to the one with the earliest deadline, and the remainder is carried
over. A keyed permutation of the domain's chunks, and of the rows within a block of chunks, gives
the rows themselves. So reading stays local, any position is reached in O(1), no list of rows is
held, and the state is two numbers per domain. The trade-off compared with a full shuffle: the
rows of one chunk stay within one block.

The permutation is the project's own integer arithmetic (`ddk_cache.rng`), because the order must
never change between versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk_cache import Extent
from ddk_cache.rng import key_of, permute

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BLOCK_CHUNKS = 16
"""Chunks whose rows are shuffled together."""


class Order:
    """The endless order of one domain's rows: each epoch another permutation."""

    def __init__(self, name: str, extents: Sequence[Extent], chunk_rows: int, seed: int) -> None:
        self.name, self.chunk_rows, self.seed = name, chunk_rows, seed
        starts, rows = np.array([[0, 0], *extents], np.int64).T
        chunks = -(-rows // chunk_rows)
        self._ends: Ints = starts + rows
        """One past the last row of each extent."""
        self._until: Ints = np.cumsum(chunks)
        """Chunks up to and including each extent."""
        self._shift: Ints = starts - (self._until - chunks) * chunk_rows
        """First row of each extent, minus the rows that all chunks before it can hold."""
        self.chunks, self.rows = int(chunks.sum()), int(rows.sum())
        self.slots = self.chunks * chunk_rows
        """Places in an epoch; a chunk that is not full has places without a row."""

    def take(self, cursor: int, count: int) -> tuple[Ints, int]:
        """Return the next `count` rows after a cursor, and the new cursor."""
        parts = []
        while count:
            rows = self._at(np.arange(cursor, cursor + count))
            parts.append(rows)
            cursor += count
            count -= len(rows)
        return np.concatenate([np.empty(0, np.int64), *parts]), cursor

    def _at(self, cursors: Ints) -> Ints:
        """Return the rows at these places of the order; places without a row are skipped."""
        epochs, places = np.divmod(cursors, self.slots)
        return np.concatenate([self._in_epoch(e, places[epochs == e]) for e in np.unique(epochs)])

    def _in_epoch(self, epoch: int, places: Ints) -> Ints:
        block = BLOCK_CHUNKS * self.chunk_rows
        key = key_of(self.seed, self.name, epoch)
        shuffled = np.empty_like(places)
        for number in np.unique(places // block):
            here = places // block == number
            start = int(number) * block
            size = min(block, self.slots - start)
            inner_key = key_of(key, int(number))
            shuffled[here] = start + permute(places[here] - start, size, inner_key)
        chunk = permute(shuffled // self.chunk_rows, self.chunks, key)
        extent = np.searchsorted(self._until, chunk, side="right")
        rows = self._shift[extent] + chunk * self.chunk_rows + shuffled % self.chunk_rows
        inside: Ints = rows[rows < self._ends[extent]]
        return inside


@dataclass(frozen=True)
class Draw:
    """The rows of one step, in order."""

    domain: Ints
    """(B) number of each row's domain."""
    row: Ints
    """(B) row number within the domain's split."""


class Mixture:
    """Rows of several domains, drawn by weights that may change at every step."""

    def __init__(
        self, extents: Mapping[str, Sequence[Extent]], *, chunk_rows: int, rows: int, seed: int
    ) -> None:
        self.orders = [Order(name, runs, chunk_rows, seed) for name, runs in extents.items()]
        self.rows = rows
        self.cursor = [0] * len(self.orders)
        self.owed: Floats = np.zeros(len(self.orders))
        """(D) rows due to each domain by its weights so far, minus the rows drawn from it."""

    def next(self, weights: Floats) -> Draw:
        """Return the next step's rows under `weights` (D, summing to one)."""
        domain = np.array([self._pick(weights) for _ in range(self.rows)], np.int64)
        row = np.empty(self.rows, np.int64)
        for number, order in enumerate(self.orders):
            here = domain == number
            row[here], self.cursor[number] = order.take(self.cursor[number], int(here.sum()))
        return Draw(domain, row)

    def _pick(self, weights: Floats) -> int:
        """Return the domain of the next row: the earliest deadline first."""
        self.owed = self.owed + weights
        deadline = np.where(self.owed > 0, (1 - self.owed) / np.maximum(weights, 1e-12), np.inf)
        chosen = int(np.argmin(deadline))
        self.owed[chosen] -= 1
        return chosen

    @property
    def sizes(self) -> Floats:
        """Return (D) the rows of each domain."""
        return np.array([order.rows for order in self.orders], np.float64)

    def epochs(self, state: Mapping[str, Any]) -> list[float]:
        """Return the number of passes over each domain at a state, with fractions."""
        return [state[order.name][0] / order.slots for order in self.orders]

    def begun(self, state: Mapping[str, Any]) -> list[int]:
        """Return the epoch of each domain's latest row at a state, counted from 0."""
        return [max(state[order.name][0] - 1, 0) // order.slots for order in self.orders]

    def state_dict(self) -> dict[str, Any]:
        """Return the state by domain: plain JSON values, floats exact."""
        return {
            order.name: [cursor, float(owed).hex()]
            for order, cursor, owed in zip(self.orders, self.cursor, self.owed, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; a domain that is not in it starts at its beginning."""
        known = [state.get(order.name, [0, "0x0p+0"]) for order in self.orders]
        self.cursor = [int(cursor) for cursor, _ in known]
        self.owed = np.array([float.fromhex(owed) for _, owed in known])
