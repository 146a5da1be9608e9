"""Which shards are committed, found by the names of their records."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddk_cache import CorruptCacheError
from ddk_cache.format.commit import committed, committed_of, uncommitted
from ddk_cache.format.plan import ShardKey
from ddk_cache.read.cache import Cache
from ddk_cache.storage.local import LocalStorage


def test_only_the_names_of_records_count(cache: Cache, copied: Path) -> None:
    storage, pair = LocalStorage(copied), ("letters", "train")
    planned = cache.shard_count(*pair)
    assert planned > 2
    assert sorted(committed(storage, *pair)) == list(range(planned))
    assert uncommitted(storage, cache.manifest) == []
    records = copied / "commits/letters/train"
    (records / "1.json").rename(records / "1.json.old")
    for other in ("one.json", "-1.json", "²", "²..json", "1"):
        (records / other).touch()
    assert sorted(committed(storage, *pair)) == [0, *range(2, planned)]
    assert uncommitted(storage, cache.manifest) == [ShardKey(*pair, 1)]
    assert uncommitted(storage, cache.manifest, ["digits"]) == []
    assert committed_of(storage, *pair, planned).tolist() == [n != 1 for n in range(planned)]
    (records / f"{planned}.json").touch()
    with pytest.raises(CorruptCacheError, match=rf"record of shard letters/train/{planned}, but"):
        committed_of(storage, *pair, planned)
