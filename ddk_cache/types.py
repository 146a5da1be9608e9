"""What a cache hands over: rows, sparse targets, and the names of the two splits.

Standard library and NumPy only, so that any module can import it at no cost.

Shape letters: R rows, S positions in a row, K kept entries of a position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy.typing as npt

TRAIN = "train"
"""Rows to learn from."""

VALIDATION = "validation"
"""Held-out rows, on which the gap is measured."""

SPLITS = (TRAIN, VALIDATION)

Array = npt.NDArray[Any]

A = TypeVar("A")
B = TypeVar("B")


FIELDS = ("label_kept", "exact_count", "drawn_count", "drawn_prob")
"""Small numbers of a position. They share an array, because each array costs a reader as much time
as the decompression of one of them."""

LABEL_KEPT, EXACT_COUNT, DRAWN_COUNT, DRAWN_PROB = range(len(FIELDS))


@dataclass(frozen=True)
class SparseTargets(Generic[A]):
    """A teacher distribution at each position: kept entries and the mass of everything else.

    The probabilities are of the full vocabulary. Kept entries and tail sum to one; sampled targets
    have no tail. The arrays are NumPy's when they come from a cache and torch's in a training step.
    """

    ids: A
    """(..., K) token ids; −1 where a position has fewer than K entries."""
    probs: A
    """(..., K) float32 probabilities; 0 where there is no entry."""
    tail: A
    """(...) float32, the probability of all ids that were not kept."""

    def map(self, f: Callable[[A], B]) -> SparseTargets[B]:
        """Return the targets with a function applied to each of the three arrays."""
        return SparseTargets(f(self.ids), f(self.probs), f(self.tail))


@dataclass(frozen=True)
class Rows:
    """Rows read from a cache, decoded. One row, read by a single number, has no axis R."""

    tokens: Array
    """(R, S+1) int64: position s predicts token s+1."""
    targets: SparseTargets[Array]
    """(R, S, K)"""
    label_logprob: Array
    """(R, S) float32, the teacher's log-probability of the true next token, nats."""
    loss_mask: Array
    """(R, S) bool, true where the loss counts."""
    segments: Array | None = None
    """(R, S+1) int64, where documents are kept apart: 1, 2, … for the documents of a row, 0 for
    padding."""

    def first(self) -> Rows:
        """Return the first row, without the axis R."""
        return Rows(
            tokens=self.tokens[0],
            targets=self.targets.map(lambda array: array[0]),
            label_logprob=self.label_logprob[0],
            loss_mask=self.loss_mask[0],
            segments=None if self.segments is None else self.segments[0],
        )
