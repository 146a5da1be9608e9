"""The order of rows: a permutation, by weight, resumable at every step."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_cache import Extent
from ddk_cache.rng import permute
from ddk_train.data.mixture import BLOCK_CHUNKS, Mixture, Order

EXTENTS = {"a": [Extent(0, 37), Extent(40, 5)], "b": [Extent(0, 8)], "c": [Extent(0, 200)]}


def mixture(rows: int = 10, seed: int = 0) -> Mixture:
    return Mixture(EXTENTS, chunk_rows=4, rows=rows, seed=seed)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_one_to_one(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_is_the_same_for_ever() -> None:
    assert permute(np.arange(10), 10, 42).tolist() == PERMUTED
    assert permute(np.arange(3), 10**12, 7).tolist() == PERMUTED_LARGE


PERMUTED = [5, 7, 0, 8, 2, 4, 9, 6, 1, 3]
PERMUTED_LARGE = [240382113207, 516379847401, 704438692625]


def test_neighbours_are_scattered() -> None:
    gaps = np.diff(permute(np.arange(10_000), 10_000, 3))
    assert (np.abs(gaps) < 100).mean() < 0.05


@pytest.mark.parametrize("take", [1, 7, 42])
def test_an_epoch_has_every_row_once_and_the_next_another_order(take: int) -> None:
    order = Order("a", EXTENTS["a"], 4, seed=1)
    cursor = 0
    epochs: list[list[int]] = []
    rows: list[int] = []
    while len(epochs) < 3:
        some, cursor = order.take(cursor, take)
        rows += some.tolist()
        while len(rows) >= 42:
            epochs.append(rows[:42])
            rows = rows[42:]
    valid = sorted([*range(37), *range(40, 45)])
    assert all(sorted(epoch) == valid for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_rows_drawn_together_lie_in_few_chunks() -> None:
    order = Order("c", [Extent(0, 4000)], 4, seed=1)
    rows, _ = order.take(0, BLOCK_CHUNKS * 4)
    assert len(np.unique(rows // 4)) == BLOCK_CHUNKS


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), st.integers(1, 20), st.integers(1, 30))
def test_counts_follow_constant_weights_within_one_row(
    raw: list[float], rows: int, steps: int
) -> None:
    weights = np.array(raw) / np.sum(raw)
    order, seen = mixture(rows), np.zeros(3)
    for step in range(1, steps + 1):
        seen += np.bincount(order.next(weights).domain, minlength=3)
        assert (np.abs(seen - step * rows * weights) < 1).all()


@pytest.mark.parametrize("domains", [2, 3, 8])
def test_counts_follow_changing_weights_within_one_row(domains: int) -> None:
    runs = {str(number): [Extent(0, 10_000)] for number in range(domains)}
    for seed in range(20):
        order = Mixture(runs, chunk_rows=4, rows=10, seed=seed)
        generator, due, seen = np.random.default_rng(seed), np.zeros(domains), np.zeros(domains)
        for step in range(60):
            if step % 5 == 0:
                weights = 0.5 * generator.dirichlet(np.full(domains, 0.5)) + 0.5 / domains
            seen += np.bincount(order.next(weights).domain, minlength=domains)
            due += 10 * weights
            assert (np.abs(seen - due) < 1).all()


def test_an_order_of_many_rows_takes_no_memory_for_them() -> None:
    order = Order("a", [Extent(0, 10**12), Extent(10**13, 10**12)], 4, seed=1)
    rows, cursor = order.take(10**12 + 1, 500)
    assert cursor == 10**12 + 501
    assert len(np.unique(rows)) == 500
    assert ((rows < 10**12) | (rows >= 10**13)).all()


def feedback(step: int, rows: Any) -> Any:
    """Return weights that depend on the rows drawn so far."""
    raw = (
        1
        + np.array([np.sum(rows % 3 == n) for n in range(3)])
        + np.array([0, 9 * (step // 3 == 2), 0])
    )
    return raw / raw.sum()


def test_a_run_goes_on_exactly_from_the_state_of_every_step() -> None:
    def play(order: Mixture, weights: Any, steps: range) -> list[tuple[Any, Any, Any]]:
        out = []
        for step in steps:
            state = json.dumps(order.state_dict())
            draw = order.next(weights)
            out.append((state, weights, draw.domain.tolist() + draw.row.tolist()))
            weights = feedback(step, draw.row)
        return out

    whole = play(mixture(), np.array([0.5, 0.3, 0.2]), range(30))
    for step, (state, weights, _) in enumerate(whole):
        order = mixture()
        order.load_state_dict(json.loads(state))
        assert play(order, weights, range(step, 30)) == [
            (s, pytest.approx(w), d) for s, w, d in whole[step:]
        ]


def test_a_domain_without_weight_is_never_drawn() -> None:
    order = mixture()
    drawn = [order.next(np.array([0.5, 0.0, 0.5])).domain for _ in range(5)]
    assert 1 not in np.concatenate(drawn)


def test_seeds_give_other_orders() -> None:
    weights = np.full(3, 1 / 3)
    assert mixture(seed=1).next(weights).row.tolist() != mixture(seed=2).next(weights).row.tolist()
