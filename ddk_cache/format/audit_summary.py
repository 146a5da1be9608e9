"""What the record of a shard says was seen of its targets: its check, and sums over shards.

The bounds find damaged numbers, not unlikely ones; writer and reader apply the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

MASS_BINS = 50
"""Even bins of kept mass over [0, 1]."""

LARGEST = {"kl": 1e3, "total_variation": 1e3, "tail": 1e3, "gradient_error": 1e31}
"""What `ddk_cache.build.fidelity` measures, and the largest value per position. A gradient error is
a ratio to the gradient, which vanishes for an even distribution: it may be very large."""


def sound(seen: Mapping[str, Any], most: int, *, all_seen: bool = True) -> dict[str, Any]:
    """Return an audit of a shard of `most` positions; ValueError where none can be like this.

    Where documents are kept apart, not all positions are seen.
    """
    positions = seen["positions"]
    bins = [int(count) for count in seen["kept_mass_bins"]]
    sums = {name: float(seen[name]) for name in ("entropy", "kept_mass", "largest_error")}
    largest = dict.fromkeys(sums, 1e3)
    if "fidelity" in seen:
        sums |= {name: float(seen["fidelity"][name]) for name in ("positions", *LARGEST)}
        largest |= LARGEST | {"positions": 1e3}
    possible = [
        type(positions) is int and (positions == most if all_seen else 0 <= positions <= most),
        sum(bins) == positions and len(bins) == MASS_BINS and min(bins) >= 0,
        0 <= seen["correct"] <= positions and isinstance(seen["correct"], int),
        all(-1 <= value <= largest[name] * (most + 1) for name, value in sums.items()),
    ]
    if not all(possible):
        raise ValueError(f"an audit that cannot have been seen: {dict(seen)!r}")
    return dict(seen)


def total(audits: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means and quantiles over the audits of several shards; empty of none."""
    audits = list(audits)
    if not audits:
        return {}
    positions = max(1, sum(audit["positions"] for audit in audits))
    bins = np.sum([audit["kept_mass_bins"] for audit in audits], axis=0)
    edges = np.linspace(0, 1, MASS_BINS + 1)
    below = np.concatenate([[0.0], np.cumsum(bins) / positions])
    return {
        "accuracy": sum(audit["correct"] for audit in audits) / positions,
        "entropy": sum(audit["entropy"] for audit in audits) / positions,
        "kept_mass": sum(audit["kept_mass"] for audit in audits) / positions,
        "kept_mass_quantiles": {
            str(q): float(np.interp(q, below, edges)) for q in (0.01, 0.1, 0.5, 0.9)
        },
        "largest_error": max(audit["largest_error"] for audit in audits),
        "fidelity": _lost([audit["fidelity"] for audit in audits if "fidelity" in audit]),
    }


def _lost(parts: list[Mapping[str, float]]) -> dict[str, float]:
    """Return means over the positions that were compared with the full distribution."""
    positions = sum(part["positions"] for part in parts)
    if not positions:
        return {}
    return {name: sum(part[name] for part in parts) / positions for name in LARGEST}
