"""Distributions that others have written → the scores that a build has from its teacher.

Only the likeliest ids are given, so the tail is 1 − Σ. The true token's log-probability is that of
its entry. Where it has none, it is set to the largest value that it can have, the least of the
entries or the tail: the teacher's loss is then a lower bound, and no gap is understated.

Shape letters: L tokens of a document, K entries of a position.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ddk_cache.errors import InputError
from ddk_cache.transfer.formats import Given
from ddk_cache.types import Array

MOST_MASS = 1.05
"""Sum of probabilities, at most: more is no rounding, but another temperature or no logarithm."""

NEGLIGIBLE = 2.0**-20
"""A tail below this is the rounding of float32 log-probabilities, and counts as none."""


class Scored(NamedTuple):
    """A document of L tokens; position s predicts token s + 1, and the last one nothing."""

    tokens: Array
    """(L) int64."""
    ids: Array
    """(L, K) int64, the likeliest first, then −1."""
    logprobs: Array
    """(L, K) float32, nats; −inf where there is no entry."""
    tail_logprob: Array
    """(L) float32."""
    label_logprob: Array
    """(L) float32."""
    counted: Array
    """(L) bool: there is a distribution, and the loss counts."""


class Arranged(NamedTuple):
    """A document, and what was seen of it."""

    scored: Scored
    missing: int
    """Counted positions whose true token is not an entry."""
    most_mass: float
    """The largest sum of probabilities that was given; a sum above one is scaled to one."""


def hits(given: Given) -> tuple[int, int]:
    """Return how often distribution i has token i, and token i + 1, as an entry."""
    own, tokens = given.ids[: len(given.tokens)], given.tokens
    this = (own == tokens[: len(own), None]).any(-1).sum()
    following = (own[: len(tokens) - 1] == tokens[1:, None]).any(-1).sum()
    return int(this), int(following)


def arrange(given: Given, own: bool, size: int, vocab_size: int) -> Arranged:
    """Return the scores of a document.

    Args:
        given: The document.
        own: Whether distribution i is that of token i, and not of token i + 1.
        size: K.
        vocab_size: Every id must be below it.

    Raises:
        InputError: an id is outside of the vocabulary, or a sum of probabilities is above
            `MOST_MASS`.
    """
    L = len(given.tokens)
    if max(given.tokens.max(initial=0), given.ids.max(initial=0)) >= vocab_size:
        raise InputError(
            f"got an id of {max(given.tokens.max(), given.ids.max()):,}, expected ids below "
            f"{vocab_size:,}, the size of the vocabulary. Give the teacher's --tokenizer or its "
            "--vocab-size."
        )
    first = 1 if own and len(given.ids) == L else 0
    ids, logprobs = (part[first : first + L - 1] for part in (given.ids, given.logprobs))
    ids = np.where(np.exp(logprobs.astype(np.float32)) != 0, ids, -1)
    order = np.argsort(-logprobs, -1, kind="stable")
    ids, logprobs = (np.take_along_axis(part, order, -1) for part in (ids, logprobs))
    mass = np.exp(logprobs).sum(-1)
    most = float(mass.max(initial=0))
    if not most <= MOST_MASS:
        raise InputError(
            f"got probabilities with a sum of {most:.3g}, expected 1 at most. Give the teacher's "
            "log-probabilities at temperature 1, over its full vocabulary."
        )
    logprobs = logprobs - np.log(np.maximum(mass, 1))[:, None]
    tail = np.maximum(1 - mass, 0)
    tail[tail < NEGLIGIBLE] = 0
    labels = given.tokens[1:, None]
    at_label = ids == labels
    there, known = (ids >= 0).any(-1), at_label.any(-1)
    with np.errstate(divide="ignore"):
        tail_logprob = np.log(tail)
    least = np.where(ids >= 0, logprobs, 0).min(-1, initial=0)
    bound = np.where(tail > 0, np.minimum(least, tail_logprob), least)
    label = np.where(known, np.where(at_label, logprobs, -np.inf).max(-1, initial=-np.inf), bound)
    counted = there & given.counted[1:]
    out = Scored(
        tokens=given.tokens,
        ids=np.full((L, size), -1),
        logprobs=np.full((L, size), -np.inf, np.float32),
        tail_logprob=np.full(L, -np.inf, np.float32),
        label_logprob=np.zeros(L, np.float32),
        counted=np.append(counted, False),
    )
    # A position without a distribution counts nothing; a certain id stands there.
    out.ids[:, 0] = np.append(given.tokens[1:], 0)
    out.logprobs[:, 0] = 0
    rows = np.flatnonzero(there)
    logprobs = np.where(ids >= 0, logprobs, -np.inf)
    out.ids[rows, : ids.shape[1]], out.logprobs[rows, : ids.shape[1]] = ids[rows], logprobs[rows]
    out.tail_logprob[rows], out.label_logprob[rows] = tail_logprob[rows], label[rows]
    return Arranged(out, int((counted & ~known).sum()), most)
