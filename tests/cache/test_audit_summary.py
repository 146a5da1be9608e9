"""What a record may say was seen, and sums over shards."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ddk_cache.format.audit_summary import LARGEST, MASS_BINS, sound, total

LOST = {"positions": 2.0, "kl": 0.1, "total_variation": 0.2, "tail": 0.3, "gradient_error": 1e30}
SEEN: dict[str, Any] = {
    "positions": 6,
    "correct": 4,
    "entropy": 9.0,
    "kept_mass": 5.0,
    "kept_mass_bins": [0] * (MASS_BINS - 1) + [6],
    "largest_error": 0.01,
    "fidelity": LOST,
}


def test_a_large_gradient_error_is_possible_and_a_large_divergence_is_not() -> None:
    assert sound(SEEN, 6) == SEEN
    for name in LARGEST.keys() - {"gradient_error"}:
        with pytest.raises(ValueError, match="cannot have been seen"):
            sound(SEEN | {"fidelity": LOST | {name: 1e30}}, 6)


@pytest.mark.parametrize(
    "change",
    [
        {"positions": 7},
        {"correct": 7},
        {"entropy": math.nan},
        {"kept_mass_bins": [6]},
        {"fidelity": LOST | {"gradient_error": math.inf}},
    ],
)
def test_what_cannot_have_been_seen_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot have been seen"):
        sound(SEEN | change, 6)


def test_sums_are_means_over_positions() -> None:
    summed = total([SEEN, SEEN | {"correct": 1}])
    assert summed["accuracy"] == pytest.approx(5 / 12)
    assert summed["entropy"] == pytest.approx(1.5)
    assert summed["fidelity"]["tail"] == pytest.approx(0.15)
    assert total([]) == {}
