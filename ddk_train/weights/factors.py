"""Factors of domains, kept as logarithms: normalized, mixed with even shares, kept above a floor.

Arrays have one entry per domain, D.
"""

from __future__ import annotations

import numpy as np

from ddk_train.weights.gaps import Floats

FLOOR = 1e-4
"""The smallest weight of a domain is this over D. It matters only for rules that saturate: Eq. 2
stays far above it at α < 1."""


def even(domains: int) -> Floats:
    """Return log(1/D) for each of D domains."""
    return np.full(domains, -np.log(domains))


def by_share(shares: Floats) -> Floats:
    """Return the logarithms of shares, −∞ for none."""
    with np.errstate(divide="ignore"):
        return np.log(shares)


def log_softmax(logits: Floats) -> Floats:
    """Return x − log Σ exp(x) without overflow."""
    shifted: Floats = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def mixed(log_r: Floats, share: float) -> Floats:
    """Return log(share · r + (1 − share) / D)."""
    with np.errstate(divide="ignore"):  # log 0 = −inf is right for shares of 0 and 1
        even = np.log((1 - share) / len(log_r))
        log_mixed: Floats = np.logaddexp(np.log(share) + log_r, even)
    return log_mixed


def floored(log_r: Floats) -> Floats:
    """Return r with a sum of one, raised to at least FLOOR / D (up to a relative FLOOR)."""
    weights: Floats = np.maximum(np.exp(log_softmax(log_r)), FLOOR / len(log_r))
    weights /= weights.sum()
    return weights
