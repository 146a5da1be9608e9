"""Numbers in a plan that files must bear out before anything is sized by them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddk_cache import CorruptCacheError, open_cache
from ddk_cache.format.manifest import Manifest, write_plan
from ddk_cache.read.cache import Cache
from ddk_cache.storage.local import LocalStorage
from ddk_cache.types import TRAIN


def claim(root: Path, shards: int) -> LocalStorage:
    """Put a plan of so many training shards, sealed like any other, into a cache."""
    storage, cache = LocalStorage(root), open_cache(root)
    plan = cache.plan("letters")
    plan.portions[0].rows[TRAIN] = shards * cache.spec.shard_rows  # type: ignore[index]
    write_plan(storage, cache.spec, "letters", plan)
    return storage


@pytest.mark.parametrize("shards", [2000, 2**40])
def test_a_plan_of_many_more_shards_than_there_are_is_refused(copied: Path, shards: int) -> None:
    storage = claim(copied, shards)
    with pytest.raises(CorruptCacheError, match=rf"plans {shards:,} shards of train rows, but"):
        Manifest.read(storage)


@pytest.mark.parametrize(("every", "good"), [(1, True), (2, True), (8, False)])
def test_a_plan_is_believed_where_a_part_of_its_token_rows_is_lost(
    cache: Cache, copied: Path, every: int, good: bool
) -> None:
    storage = claim(copied, 1600)
    tokens = storage.root / "domains/letters/train/tokens/c"
    for number in range(0, 1600, 100 * every):
        (tokens / str(number)).mkdir(exist_ok=True)
        (tokens / str(number) / "0").touch()
    if good:
        assert Manifest.read(storage).plans["letters"].rows(TRAIN) == 1600 * cache.spec.shard_rows
    else:
        with pytest.raises(CorruptCacheError, match="2 of 16"):
            Manifest.read(storage)
