"""The rules against values worked out by hand, their bounds, and the guard rails of all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_cache import DDKError, InputError
from ddk_train.weights.factors import FLOOR
from ddk_train.weights.gain import shrunk
from ddk_train.weights.gaps import Floats, Gaps, Settings
from ddk_train.weights.given import chosen_domains, given_weights, parse_domains, parse_weights
from ddk_train.weights.moving import DomainWeights
from ddk_train.weights.rules import FOLLOW_GAPS, RULES, update

HALF = Settings(0.5)


def gaps(ratios: list[float], sizes: list[float] | None = None, rows: float = 0.0) -> Gaps:
    """Return gaps of given perplexity ratios, after so many rows of each domain."""
    D = len(ratios)
    teacher = np.linspace(1.0, 3.0, D)
    return Gaps(
        teacher + np.log(ratios),
        teacher,
        np.array(sizes or [1.0] * D),
        rows_seen=np.full(D, rows),
        epochs=np.full(D, rows / 10),
        fall_error=np.full(D, 1e-3),
    )


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


def after(rows: list[float], gap: list[float], error: list[float], **more: Any) -> Gaps:
    """Return a measurement with given gaps above a teacher at 1 nat."""
    teacher = np.ones(len(gap))
    given = {"rows_seen": np.array(rows), "fall_error": np.array(error)}
    return Gaps(teacher + gap, teacher, np.ones(len(gap)), **given | more)


START = after([0, 0, 0, 0], [2, 2, 2, 2], [math.nan] * 4)
THEN = after([10, 10, 20, 40], [1.0, 1.5, 1.0, 0.5], [0.01] * 4)
# e = (1, 1.5, 1, 0.5), Σe = 4; falls (1, 0.5, 1, 1.5) over (10, 10, 20, 40) rows are per row
# (8, 4, 4, 3) / 80, Σu = 19 / 80.
BY_GAP, BY_FALL = np.array([2, 3, 2, 1]) / 8, np.array([8, 4, 4, 3]) / 19


def shares(*measurements: Gaps, **changes: Any) -> Floats:
    """Return r under `gain` at α = 1 after these measurements."""
    log_r, settings = None, Settings(**{"alpha": 1.0} | changes)
    for number, some in enumerate(measurements):
        log_r = update("gain", some, log_r, settings, measurements[:number]).log_factor
    assert log_r is not None
    return np.exp(log_r)


def test_gain_by_hand() -> None:
    np.testing.assert_allclose(shares(START), 1 / 4)
    np.testing.assert_allclose(shares(START, THEN), (BY_GAP + BY_FALL) / 2, rtol=1e-12)
    np.testing.assert_allclose(shares(START, THEN, rho=0.0), BY_GAP, rtol=1e-12)
    np.testing.assert_allclose(shares(START, THEN, rho=1.0), BY_FALL, rtol=1e-12)
    mixed = 0.25 / 4 + 0.75 * (BY_GAP + BY_FALL) / 2
    np.testing.assert_allclose(shares(START, THEN, alpha=0.75), mixed, rtol=1e-12)
    risen = after([10, 10, 20, 40], [3, 3, 3, 3], [0.01] * 4)
    np.testing.assert_allclose(shares(START, risen), 1 / 4)
    better = after([10, 10, 20, 40], [-1, 0, -2, -1], [0.01] * 4)
    np.testing.assert_allclose(shares(START, better), 1 / 4)


def test_progress_that_is_not_known_leaves_a_domain_its_gap() -> None:
    # The second domain's fall of 0.5 is below 3 · 0.2; it keeps 3/8, the others divide 5/8.
    noisy = replace(THEN, fall_error=np.array([0.01, 0.2, 0.01, 0.01]))
    by_fall = np.array([8, 0, 4, 3]) / 15 * 5 / 8 + np.array([0, 3 / 8, 0, 0])
    np.testing.assert_allclose(shares(START, noisy), (BY_GAP + by_fall) / 2, rtol=1e-12)
    # A domain that did not fall at all is known not to have, where that is measured well.
    stuck = replace(THEN, student_loss=np.array([2.0, 3.0, 2.0, 1.5]))
    by_gap, by_fall = np.array([1, 2, 1, 0.5]) / 4.5, np.array([8, 0, 4, 3]) / 15
    np.testing.assert_allclose(shares(START, stuck), (by_gap + by_fall) / 2, rtol=1e-12)
    # One whose loss rose was pushed by the rows of others; what its own give is not known.
    risen = replace(THEN, student_loss=np.array([2.0, 3.2, 2.0, 1.5]))
    by_gap, by_fall = np.array([1, 2.2, 1, 0.5]) / 4.7, np.array([8, 0, 4, 3]) / 15 * 2.5 / 4.7
    by_fall[1] = by_gap[1]
    np.testing.assert_allclose(shares(START, risen), (by_gap + by_fall) / 2, rtol=1e-12)
    for unknown in (
        replace(THEN, fall_error=np.full(4, math.nan)),
        replace(THEN, fall_error=np.full(4, 10.0)),
        replace(THEN, rows_seen=np.zeros(4)),
    ):
        np.testing.assert_allclose(shares(START, unknown), BY_GAP, rtol=1e-12)


def test_the_window_of_gain_ends_before_the_learning_rate_decays() -> None:
    old = after([0, 0, 0, 0], [9, 2, 2, 2], [0.01] * 4)
    np.testing.assert_array_equal(shares(old, START, THEN, window=1), shares(START, THEN))
    late = after([20, 20, 40, 80], [0.5, 0.1, 0.9, 0.5], [0.01] * 4, decaying=True)
    by_gap = np.array([5, 1, 9, 5]) / 20
    np.testing.assert_allclose(shares(START, THEN, late), (by_gap + BY_FALL) / 2, rtol=1e-12)
    np.testing.assert_allclose(shares(START, THEN, late, late), (by_gap + BY_FALL) / 2, rtol=1e-12)


def test_shrinkage_by_hand() -> None:
    # v̄ = 2, Σ(v − v̄)² = 10, mean s² = 2: 1 − (5 − 3) · 2 / 10 = 0.6.
    values, errors = (
        np.array([0.0, 1, 2, 3, 4]),
        np.array([1.0, 1, 1, math.sqrt(3.5), math.sqrt(3.5)]),
    )
    np.testing.assert_allclose(shrunk(values, errors), [0.8, 1.4, 2, 2.6, 3.2], rtol=1e-12)
    np.testing.assert_allclose(shrunk(values, 9 * errors), 2, rtol=1e-12)
    np.testing.assert_allclose(shrunk(values[:3], errors[:3]), values[:3])
    np.testing.assert_allclose(shrunk(np.ones(5), errors), 1)
    loud = replace(THEN, fall_error=np.array([10.0, 10, 20, 40]) * 5)  # 5 nats per row: all noise
    by_fall = np.full(4, 1 / 4)
    got = shares(START, loud, shrink=True)
    np.testing.assert_allclose(got, (BY_GAP + by_fall) / 2, rtol=1e-12)


def test_tilt_and_the_guard_against_repetition_by_hand() -> None:
    tilted = np.array([1, 1.5, 1, 0.5]) * np.exp(np.array([1, 1.5, 1, 0.5]) - 1.5)
    for rule in ("gain", "excess"):
        settings = Settings(1.0, rho=0.0, tilt=1.0)
        log_r = update(rule, THEN, np.zeros(4), settings, [START]).log_factor
        np.testing.assert_allclose(np.exp(log_r), tilted / tilted.sum(), rtol=1e-12)
        repeated = replace(THEN, epochs=np.array([0.5, 4.0, 19.0, 34.0]))
        settings = Settings(1.0, rho=0.0, repetition_guard=True)
        log_r = update(rule, repeated, np.zeros(4), settings, [START]).log_factor
        guarded = np.array([1, 1.5, math.exp(-1), 0.5 * math.exp(-2)])
        np.testing.assert_allclose(np.exp(log_r), guarded / guarded.sum(), rtol=1e-12)


def test_gain_needs_the_rows_drawn() -> None:
    with pytest.raises(InputError, match="without rows_seen"):
        update("gain", replace(START, rows_seen=None), None, HALF)


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
    past: list[Gaps] = []
    for number, interval in enumerate(ratios):
        some = gaps(interval, [1, 50, 9, 40], 10.0 * number)
        log_r, weights = update(rule, some, log_r, settings, past)
        past.append(some)
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


@given(
    many_ratios,
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 5),
    st.booleans(),
    st.booleans(),
    st.floats(0, 1),
)
def test_gain_keeps_to_its_bounds(
    ratios: list[list[float]],
    alpha: float,
    rho: float,
    tilt: float,
    shrink: bool,
    guard: bool,
    error: float,
) -> None:
    settings = Settings(alpha, None, rho, 3, shrink, tilt, guard)
    log_r: Floats | None = None
    past: list[Gaps] = []
    for number, interval in enumerate(ratios):
        some = replace(gaps(interval, rows=50.0 * number), fall_error=np.array([0, 0.01, 1, error]))
        log_r, weights = update("gain", some, log_r, settings, past)
        past.append(some)
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert (np.exp(log_r) >= (1 - alpha) / 4 - 1e-12).all()
        assert (np.exp(log_r) <= alpha + (1 - alpha) / 4 + 1e-12).all()


# --- as a class ---


@pytest.mark.parametrize("rule", sorted(RULES))
def test_domain_weights_are_the_rule_with_its_state(rule: str) -> None:
    given = {"a": 1.0, "b": 1.0, "c": 2.0} if rule == "fixed" else None
    weights = DomainWeights(rule, ["a", "b", "c"], alpha=0.7, given=given)
    np.testing.assert_allclose(weights.weights, 1 / 3)
    settings = Settings(0.7, np.array([0.25, 0.25, 0.5]) if given else None)
    log_r: Floats | None = None
    past: list[Gaps] = []
    history = [[5e3, 2.0, 1.5], [3.0, 2.0, 1.1], [1.2, 2.0, 0.9], [1.2, 1.5, 0.9], [1.1, 1.3, 1.0]]
    for number, ratios in enumerate(history):
        some = gaps(ratios, [1, 5, 3], 7.0 * number)
        log_r, right = update(rule, some, log_r, settings, past)
        past.append(some)
        np.testing.assert_array_equal(weights.update(some), right)
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
    some = Gaps(
        np.array([1.0, np.nan]),
        np.array([1.0, np.nan]),
        np.array([1.0, 3.0]),
        rows_seen=np.zeros(2),
    )
    settings = Settings(0.5, np.array([0.5, 0.5]))
    if rule in FOLLOW_GAPS:
        with pytest.raises(DDKError, match="not finite"):
            update(rule, some, None, settings)
    else:
        right = [0.25, 0.75] if rule == "proportional" else [0.5, 0.5]
        np.testing.assert_allclose(update(rule, some, None, settings).weights, right)


def test_a_gap_of_unseen_rows_stands_in_for_held_out_rows() -> None:
    student, teacher = np.array([3.0, np.nan, np.nan, 2.0]), np.array([1.0, np.nan, np.nan, 1.0])
    some = Gaps(student, teacher, np.ones(4))
    unseen = np.array([9.0, 5.0, np.nan, np.nan]), np.array([0.0, 4.5, np.nan, np.nan])
    np.testing.assert_allclose(some.filled(*unseen).excess, [2.0, 0.5, 3.5 / 3, 1.0])
    nothing = np.full(4, np.nan)
    np.testing.assert_allclose(some.filled(nothing, nothing).excess, [2.0, 1.5, 1.5, 1.0])
    none = Gaps(nothing, nothing, np.ones(4)).filled(nothing, nothing)
    np.testing.assert_allclose(none.excess, 0)
    np.testing.assert_allclose(update("excess", none, None, HALF).weights, 0.25)


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


def test_domains_are_those_named_or_weighted_or_all() -> None:
    known = ["chat", "code", "web"]
    assert chosen_domains(known, "", "") == known
    assert chosen_domains(known, "web, code", "") == ["code", "web"]
    assert chosen_domains(known, "", "web=3") == ["web"]
    assert chosen_domains(known, "code,web", "web=3,code=1") == ["code", "web"]
    with pytest.raises(InputError, match=r"unknown domain 'cod'\. Did you mean 'code'"):
        chosen_domains(known, "cod", "")
    with pytest.raises(InputError, match="expected a weight for each of --domains code, web"):
        chosen_domains(known, "code,web", "web=3")
    with pytest.raises(InputError, match="got web twice"):
        parse_domains("web,code,web")
