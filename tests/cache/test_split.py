"""Domains and splits: a cache as a mapping, and its rows by place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddk_cache import (
    SPLITS,
    Cache,
    Domain,
    InputError,
    RowRangeError,
    Rows,
    UnfinishedCacheError,
    UnknownNameError,
    open_cache,
)


def same(one: Rows, other: Rows) -> None:
    """Compare all arrays of rows."""
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
    np.testing.assert_array_equal(one.label_logprob, other.label_logprob)
    for name in ("ids", "probs", "tail"):
        np.testing.assert_array_equal(getattr(one.targets, name), getattr(other.targets, name))


def test_a_cache_is_a_mapping_of_its_domains(cache: Cache) -> None:
    assert list(cache) == cache.domains == ["digits", "letters", "notes"]
    assert len(cache) == 3
    assert "letters" in cache
    assert "leters" not in cache
    assert cache.get("leters") is None
    assert {name for name, _ in cache.items()} == set(cache)
    assert cache == cache
    assert isinstance(hash(cache), int)


def test_a_domain_is_a_mapping_of_its_splits(cache: Cache) -> None:
    domain = cache["letters"]
    assert isinstance(domain, Domain)
    assert list(domain) == list(SPLITS)
    assert domain["train"] is domain.train
    assert domain["validation"] is domain.validation
    assert "test" not in domain


def test_an_unknown_name_is_told_with_the_nearest(cache: Cache) -> None:
    with pytest.raises(UnknownNameError, match=r"mix.zarr: unknown domain 'leters'. Did you mean"):
        cache["leters"]
    with pytest.raises(UnknownNameError, match=r"letters: unknown split 'trian'. Did you mean"):
        cache["letters"]["trian"]
    with pytest.raises(UnknownNameError, match="unknown split 'test'"):
        cache.read("letters", "test", [0])
    with pytest.raises(UnknownNameError, match="unknown split 'test'"):
        cache.read("letters", "test", [])
    with pytest.raises(UnknownNameError, match="unknown domain '3'"):
        cache[3]  # type: ignore[index]


def test_rows_are_found_by_place(cache: Cache) -> None:
    split = cache["letters"].train
    numbers = cache.row_numbers("letters", "train")
    assert len(split) == len(numbers)
    same(split[2:9:3], cache.read("letters", "train", numbers[2:9:3]))
    same(split[[5, 1, -1, 5]], cache.read("letters", "train", numbers[[5, 1, -1, 5]]))
    same(split[-2:], cache.read("letters", "train", numbers[-2:]))
    same(split[np.array([3, 0], np.uint16)], split[torch.tensor([3, 0])])  # type: ignore[index]
    same(split[10**6 :], split[[]])
    assert split[[]].tokens.shape == (0, cache.spec.seq_len + 1)


def test_one_place_gives_one_row_without_its_axis(cache: Cache) -> None:
    split = cache["letters"].validation
    row = split[-1]
    assert row.tokens.shape == (cache.spec.seq_len + 1,)
    assert row.targets.ids.shape == (cache.spec.seq_len, cache.spec.targets.size)
    same(row, split[[len(split) - 1]].first())
    assert len(list(split)) == len(split)


@pytest.mark.parametrize(
    "places", [True, [True, False], 0.7, [0.7], "0", ["0", "1"], None, [None], [[0]], [10**30]]
)
def test_places_that_are_not_integers_are_refused(places: Any, cache: Cache) -> None:
    with pytest.raises(InputError, match=r"letters/train: got .* expected an integer"):
        cache["letters"].train[places]
    if places is not None and np.ndim(places) == 1:
        with pytest.raises(InputError, match="expected an integer"):
            cache.read("letters", "train", places)


@pytest.mark.parametrize("place", [10**6, -(10**6), [0, 10**12]])
def test_a_place_that_does_not_exist_is_named(place: Any, cache: Cache) -> None:
    with pytest.raises(RowRangeError, match=r"letters/train: there is no row -?10+; it has"):
        cache["letters"].train[place]


def test_the_loss_of_the_teacher_is_that_of_its_rows(cache: Cache, copied: Path) -> None:
    split = cache["digits"].train
    rows = split[:]
    assert split.positions == rows.loss_mask.sum()
    expected = -rows.label_logprob[rows.loss_mask].mean(dtype=np.float64)
    assert split.teacher_loss == pytest.approx(expected, abs=cache.logprob.error)
    shutil.rmtree(copied / "commits/digits/train")
    split = open_cache(copied, unfinished=True)["digits"].train
    assert (split.teacher_loss, split.positions) == (None, 0)
    assert len(split) == len(rows.tokens)
    with pytest.raises(UnfinishedCacheError, match="is not committed"):
        split[0]


def test_what_they_are_can_be_read(cache: Cache) -> None:
    assert "topk:8 of 300 ids, rows of 16 tokens" in repr(cache)
    assert "digits, letters, notes; finished>" in repr(cache)
    assert repr(cache["notes"]).startswith("<Domain notes: ")
    assert repr(cache["notes"].train) == f"<Split notes/train: {len(cache['notes'].train)} rows>"
