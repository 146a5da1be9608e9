"""The rules against values worked out by hand, and the bounds of Eq. 2."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_cache import DDKError, InputError
from ddk_train.weights import RULES, Gaps, ddk, update


def gaps(ratios: list[float], sizes: list[float] | None = None) -> Gaps:
    """Return gaps of given perplexity ratios."""
    teacher = np.linspace(1.0, 3.0, len(ratios))
    return Gaps(teacher + np.log(ratios), teacher, np.array(sizes or [1.0] * len(ratios)))


def test_eq_1_by_hand() -> None:
    # softmax(1, 2, 3) = (1, e, e²) / (1 + e + e²)
    total = 1 + math.e + math.e**2
    r = np.exp(ddk(gaps([1, 2, 3]), None, 0.5))
    np.testing.assert_allclose(r, [1 / total, math.e / total, math.e**2 / total], rtol=1e-12)


def test_eq_2_by_hand() -> None:
    # r = (1/2, 1/4, 1/4), ratios (ln 1, ln 2, ln 4) → ψ = (1/2, 1/2, 1), Σψ = 2,
    # r′ = ½ (1/4, 1/4, 1/2) + ½ · 1/3 = (7/24, 7/24, 10/24); ratios must be ≥ 0, so add 1 to each,
    # which cancels.
    before = np.log([1 / 2, 1 / 4, 1 / 4])
    after = ddk(gaps([1.0, 1 + math.log(2), 1 + math.log(4)]), before, 0.5)
    np.testing.assert_allclose(np.exp(after), [7 / 24, 7 / 24, 10 / 24], rtol=1e-12)


def test_ratios_of_a_fresh_student_saturate_without_overflow() -> None:
    r = ddk(gaps([5000.0, 4000.0, 800.0]), None, 0.5)
    np.testing.assert_allclose(np.exp(r), [1, 0, 0], atol=1e-300)
    np.testing.assert_allclose(r, [0, -1000, -4200], rtol=1e-9)
    r = ddk(gaps([5000.0, 4000.0, 800.0]), np.log(np.full(3, 1 / 3)), 0.5)
    np.testing.assert_allclose(np.exp(r), [4 / 6, 1 / 6, 1 / 6], rtol=1e-9)
    # The first interval's factor is far below the smallest float64, and still comes back.
    r = ddk(gaps([3.0, 2000.0, 3.0]), np.array([0.0, -1000.0, -4200.0]), 0.5)
    np.testing.assert_allclose(np.exp(r), [1 / 6, 4 / 6, 1 / 6], rtol=1e-9)


@given(
    st.lists(st.lists(st.floats(0.5, 5000), min_size=4, max_size=4), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_factors_sum_to_one_and_keep_to_their_bounds(
    ratios: list[list[float]], alpha: float
) -> None:
    log_r = ddk(gaps(ratios[0]), None, alpha)
    for interval in ratios:
        log_r = ddk(gaps(interval), log_r, alpha)
        r = np.exp(log_r)
        assert r.sum() == pytest.approx(1, abs=1e-9)
        assert (r >= (1 - alpha) / 4 - 1e-12).all()
        assert (r <= alpha + (1 - alpha) / 4 + 1e-12).all()


def test_uniform_and_proportional() -> None:
    some = gaps([1, 2, 3], sizes=[10, 30, 60])
    np.testing.assert_allclose(np.exp(RULES["uniform"](some, None, 0.5)), [1 / 3] * 3)
    np.testing.assert_allclose(np.exp(RULES["proportional"](some, None, 0.5)), [0.1, 0.3, 0.6])


def test_a_rule_that_follows_gaps_needs_them() -> None:
    some = Gaps(np.array([1.0, np.nan]), np.array([1.0, np.nan]), np.array([1.0, 3.0]))
    with pytest.raises(InputError, match="a domain has none"):
        update("ddk", some, None, 0.5)
    np.testing.assert_allclose(np.exp(update("proportional", some, None, 0.5)), [0.25, 0.75])
    with pytest.raises(DDKError, match="not finite"):
        update("ddk", Gaps(np.array([np.inf]), np.array([1.0]), np.ones(1)), None, 0.5)
