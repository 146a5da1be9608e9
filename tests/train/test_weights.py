"""The rules against values worked out by hand, their bounds, and the guard rails of all."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_cache import DDKError, InputError
from ddk_train.weights import (
    FLOOR,
    FOLLOW_GAPS,
    RULES,
    DomainWeights,
    Floats,
    Gaps,
    Settings,
    check_measured,
    given_weights,
    parse_weights,
    update,
)

HALF = Settings(0.5)


def gaps(ratios: list[float], sizes: list[float] | None = None) -> Gaps:
    """Return gaps of given perplexity ratios."""
    teacher = np.linspace(1.0, 3.0, len(ratios))
    return Gaps(teacher + np.log(ratios), teacher, np.array(sizes or [1.0] * len(ratios)))


def factor(rule: str, some: Gaps, before: object = None, settings: Settings = HALF) -> Floats:
    """Return r after a measurement; `before` is r before."""
    log_before = None if before is None else np.log(np.asarray(before, np.float64))
    return np.exp(update(rule, some, log_before, settings).log_factor)


# --- by hand ---


@pytest.mark.parametrize("rule", ["ddk", "eq1"])
def test_eq_1_by_hand(rule: str) -> None:
    # softmax(1, 2, 3) = (1, e, e²) / (1 + e + e²)
    total = 1 + math.e + math.e**2
    right = [1 / total, math.e / total, math.e**2 / total]
    np.testing.assert_allclose(factor(rule, gaps([1, 2, 3])), right, rtol=1e-12)


def test_eq_2_by_hand() -> None:
    # r = (1/2, 1/4, 1/4), ratios (ln 1, ln 2, ln 4) → ψ = (1/2, 1/2, 1), Σψ = 2,
    # r′ = ½ (1/4, 1/4, 1/2) + ½ · 1/3 = (7/24, 7/24, 10/24); ratios must be ≥ 0, so add 1 to each,
    # which cancels.
    some = gaps([1.0, 1 + math.log(2), 1 + math.log(4)])
    after = factor("ddk", some, [1 / 2, 1 / 4, 1 / 4])
    np.testing.assert_allclose(after, [7 / 24, 7 / 24, 10 / 24], rtol=1e-12)
    alone = factor("eq1", some, [0.9, 0.05, 0.05])
    np.testing.assert_allclose(alone, [1 / 7, 2 / 7, 4 / 7], rtol=1e-12)


def test_doremi_by_hand() -> None:
    # Excess losses (−ln 2 → 0, ln 2, ln 4): r · exp = (1/2, 1/2, 1) of r = (1/2, 1/4, 1/4).
    some = gaps([0.5, 2.0, 4.0])
    right = 0.999 * np.array([1 / 4, 1 / 4, 1 / 2]) + 0.001 / 3
    after = factor("doremi", some, [1 / 2, 1 / 4, 1 / 4])
    np.testing.assert_allclose(after, right, rtol=1e-12)
    first = 0.999 * np.array([1 / 7, 2 / 7, 4 / 7]) + 0.001 / 3  # from even weights
    np.testing.assert_allclose(factor("doremi", some), first, rtol=1e-12)


def test_excess_by_hand() -> None:
    # Excess losses (0, ln 2, ln 4) are as 0 : 1 : 2.
    some = gaps([0.5, 2.0, 4.0])
    np.testing.assert_allclose(factor("excess", some), [1 / 6, 2 / 6, 3 / 6], rtol=1e-12)
    pure = factor("excess", some, settings=Settings(1.0))
    np.testing.assert_allclose(pure, [0, 1 / 3, 2 / 3], rtol=1e-12)
    np.testing.assert_allclose(factor("excess", gaps([0.9, 1.0, 0.5])), [1 / 3] * 3, rtol=1e-12)


def test_rules_that_follow_nothing() -> None:
    some = gaps([1, 2, 3], sizes=[10, 30, 60])
    np.testing.assert_allclose(factor("uniform", some), [1 / 3] * 3)
    np.testing.assert_allclose(factor("proportional", some), [0.1, 0.3, 0.6])
    given = given_weights(parse_weights("b=3, a=1,c=4"), ["a", "b", "c"])
    fixed = update("fixed", some, None, Settings(given=given)).weights
    np.testing.assert_allclose(fixed, [1 / 8, 3 / 8, 4 / 8])


def test_the_first_interval_of_algorithm_1_is_by_size() -> None:
    some = gaps([1, 2, 3], sizes=[10, 30, 60])
    for rule, by_size in (("ddk", True), ("eq1", True), ("excess", False), ("doremi", False)):
        first = update(rule, some, None, HALF)
        right = [0.1, 0.3, 0.6] if by_size else np.exp(first.log_factor)
        np.testing.assert_allclose(first.weights, right, rtol=1e-12)
        again = update(rule, some, first.log_factor, HALF)
        np.testing.assert_allclose(again.weights, np.exp(again.log_factor), rtol=1e-12)


# --- bounds ---


def test_ratios_of_a_fresh_student_saturate_without_overflow() -> None:
    fresh = gaps([5000.0, 4000.0, 800.0])
    first = update("ddk", fresh, None, HALF)
    np.testing.assert_allclose(first.log_factor, [0, -1000, -4200], rtol=1e-9)
    second = factor("ddk", fresh, [1 / 3] * 3)
    np.testing.assert_allclose(second, [4 / 6, 1 / 6, 1 / 6], rtol=1e-9)
    # The first interval's factor is far below the smallest float64, and still comes back.
    back = update("ddk", gaps([3.0, 2000.0, 3.0]), np.array([0.0, -1000.0, -4200.0]), HALF)
    np.testing.assert_allclose(back.weights, [1 / 6, 4 / 6, 1 / 6], rtol=1e-9)
    # Our own sees 8.5, 8.3 and 6.7 nats.
    np.testing.assert_allclose(factor("excess", fresh), [0.348, 0.343, 0.309], atol=1e-3)


many_ratios = st.lists(
    st.lists(st.floats(0.5, 5000), min_size=4, max_size=4), min_size=1, max_size=6
)


@given(st.sampled_from(sorted(RULES)), many_ratios, st.floats(0, 1))
def test_weights_of_every_rule_sum_to_one_above_the_floor(
    rule: str, ratios: list[list[float]], alpha: float
) -> None:
    log_r, settings = None, Settings(alpha, np.array([0.7, 0.2, 0.1 - 1e-7, 1e-7]))
    for interval in ratios:
        log_r, weights = update(rule, gaps(interval, [1, 50, 9, 40]), log_r, settings)
        assert np.exp(log_r).sum() == pytest.approx(1, abs=1e-9)
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert (weights >= FLOOR / 4 * (1 - FLOOR)).all()


@given(st.sampled_from(["ddk", "excess"]), many_ratios, st.floats(0, 1))
def test_smoothed_factors_keep_to_their_bounds(
    rule: str, ratios: list[list[float]], alpha: float
) -> None:
    log_r = update(rule, gaps(ratios[0]), None, Settings(alpha)).log_factor
    for interval in ratios:
        log_r = update(rule, gaps(interval), log_r, Settings(alpha)).log_factor
        assert (np.exp(log_r) >= (1 - alpha) / 4 - 1e-12).all()
        assert (np.exp(log_r) <= alpha + (1 - alpha) / 4 + 1e-12).all()


# --- as a class ---


@pytest.mark.parametrize("rule", sorted(RULES))
def test_domain_weights_are_the_rule_with_its_state(rule: str) -> None:
    given = {"a": 1.0, "b": 1.0, "c": 2.0} if rule == "fixed" else None
    weights = DomainWeights(rule, ["a", "b", "c"], alpha=0.7, given=given)
    np.testing.assert_allclose(weights.weights, 1 / 3)
    settings = Settings(0.7, np.array([0.25, 0.25, 0.5]) if given else None)
    log_r = None
    for ratios in ([5000.0, 2.0, 1.5], [3.0, 2.0, 1.1], [1.2, 2.0, 0.9]):
        log_r, right = update(rule, gaps(ratios, [1, 5, 3]), log_r, settings)
        np.testing.assert_array_equal(weights.update(gaps(ratios, [1, 5, 3])), right)
        np.testing.assert_array_equal(weights.weights, right)
        state = json.loads(json.dumps(weights.state_dict()))
        weights = DomainWeights(rule, ["a", "b", "c"], alpha=0.7, given=given)
        weights.load_state_dict(state)
        np.testing.assert_array_equal(weights.weights, right)


def test_a_state_of_other_domains_starts_over() -> None:
    weights = DomainWeights("ddk", ["a", "b"])
    weights.update(gaps([2.0, 3.0]))
    grown = DomainWeights("ddk", ["a", "b", "c"])
    grown.load_state_dict(weights.state_dict())
    assert grown.log_factor is None
    np.testing.assert_allclose(grown.weights, 1 / 3)


def test_domain_weights_refuse_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"unknown weighting 'dkd'\. Did you mean 'ddk'"):
        DomainWeights("dkd", ["a"])
    for rule, named in (("fixed", None), ("ddk", {"a": 1.0})):
        with pytest.raises(InputError, match="belong together"):
            DomainWeights(rule, ["a"], given=named)


# --- what is refused ---


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_domain_without_held_out_rows(rule: str) -> None:
    some = Gaps(np.array([1.0, np.nan]), np.array([1.0, np.nan]), np.array([1.0, 3.0]))
    settings = Settings(0.5, np.array([0.5, 0.5]))
    check_measured(rule, [])
    if rule in FOLLOW_GAPS:
        with pytest.raises(InputError, match="these domains have none: code, web"):
            check_measured(rule, ["code", "web"])
        with pytest.raises(DDKError, match="not finite"):
            update(rule, some, None, settings)
    else:
        check_measured(rule, ["code", "web"])
        right = [0.25, 0.75] if rule == "proportional" else [0.5, 0.5]
        np.testing.assert_allclose(update(rule, some, None, settings).weights, right)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e9])
def test_a_student_that_is_lost_is_an_error_under_every_rule(rule: str, loss: float) -> None:
    with pytest.raises(DDKError, match="not finite"):
        update(rule, Gaps(np.array([loss, 1.0]), np.ones(2), np.ones(2)), None, HALF)


@pytest.mark.parametrize(
    "text", ["a", "a=", "a=x", "=1", "a=0", "a=-1", "a=inf", "a=1,a=2", "a=1_0", "a=１", "a=0x1"]
)
def test_weights_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="cannot read the weight"):
        parse_weights(text)


def test_weights_for_other_domains_are_refused() -> None:
    with pytest.raises(InputError, match=r"unknown domain 'cod'\. Did you mean 'code'"):
        given_weights({"cod": 1.0, "web": 1.0}, ["code", "web"])
    with pytest.raises(InputError, match="got no weight for code"):
        given_weights({"web": 1.0}, ["code", "web"])
    assert given_weights({}, ["code"]) is None
