"""What both sides of a cache hand over: rows, sparse targets, and the names of the two splits.

Standard library and NumPy only, so that any module may import it and none pays for it.

Shape letters: R rows, S positions in a row, K kept entries of a position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy.typing as npt

SPLITS = ("train", "validation")
"""Rows to learn from, and held-out rows on which the gap is measured."""


Array = npt.NDArray[Any]


A = TypeVar("A")


@dataclass(frozen=True)
class SparseTargets(Generic[A]):
    """A teacher distribution at each position: kept entries and the mass of everything else.

    The probabilities are of the full vocabulary; kept entries and tail sum to one, and of sampled
    targets the entries alone do. The arrays are NumPy's when they come from a cache and torch's
    in a training step.
    """

    ids: A
    """(..., K) token ids; −1 where a position has fewer than K entries."""
    probs: A
    """(..., K) float32 probabilities; 0 where there is no entry."""
    tail: A
    """(...) float32, the probability of all ids that were not kept."""


@dataclass(frozen=True)
class Rows:
    """Rows read from a cache, decoded."""

    tokens: Array
    """(R, S+1) int64: position s predicts token s+1."""
    targets: SparseTargets[Array]
    """(R, S, K)"""
    label_logprob: Array
    """(R, S) float32, the teacher's log-probability of the true next token, nats."""
    loss_mask: Array
    """(R, S) bool, where the loss counts."""
