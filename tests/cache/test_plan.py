"""Portions, extents and shards: where the rows of a plan lie."""

from __future__ import annotations

import numpy as np
import pytest

from ddk_cache.format.plan import (
    DomainPlan,
    Extent,
    Portion,
    extents,
    rows_at,
    shard_at,
    shard_count,
)


def test_an_extent_begins_a_new_shard() -> None:
    one = Portion(1, 1, "one", {"train": 9, "validation": 0})
    two = Portion(2, 2, "two", {"train": 3, "validation": 1})
    plan = DomainPlan((one, two))
    assert extents(plan, "train", 8) == [Extent(0, 9), Extent(16, 3)]
    assert shard_count(plan, "train", 8) == 3
    found = [shard_at(plan, "train", 8, number) for number in range(3)]
    assert found == [(8, "one"), (1, "one"), (3, "two")]
    assert extents(plan, "validation", 8) == [Extent(0, 1)]
    assert shard_count(plan, "validation", 8) == 1
    assert shard_at(plan, "validation", 8, 0) == (1, "two")
    for number in (-1, 3):
        with pytest.raises(IndexError):
            shard_at(plan, "train", 8, number)
    places = np.arange(12)
    assert rows_at(extents(plan, "train", 8), places).tolist() == [*range(9), 16, 17, 18]
