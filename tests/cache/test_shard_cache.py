"""Whole shards kept on a local disk, in front of any storage."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from ddk_cache import Cache, CorruptCacheError, InputError
from ddk_cache.format.manifest import Manifest
from ddk_cache.storage.base import ByteRange, Storage
from ddk_cache.storage.local import LocalStorage
from ddk_cache.storage.shard_cache import ShardCache, parse_size


def test_any_storage_can_be_wrapped(cache: Cache, tmp_path: Path) -> None:
    storage: Storage = ShardCache(LocalStorage(cache.root), tmp_path / "shards", 10**9)
    wrapped = Cache(storage, Manifest.read(storage))
    expected = cache["letters"].train[:]
    np.testing.assert_array_equal(wrapped["letters"].train[:].tokens, expected.tokens)
    kept = list((tmp_path / "shards").iterdir())
    assert len(kept) == cache.shard_count("letters", "train") * len(cache.spec.arrays)
    again = pickle.loads(pickle.dumps(wrapped))
    np.testing.assert_array_equal(again["letters"].train[:].tokens, expected.tokens)
    wrapped.close()
    assert storage.get_many(["zarr.json"]) is not None


def test_the_least_recently_used_copies_are_evicted(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    store = LocalStorage(tmp_path / "store")
    for number in range(4):
        store.put(f"{number}", bytes([number]) * 100)
    cached = ShardCache(store, tmp_path / "shards", 250)
    for number in (0, 1, 0, 2):
        (data,) = cached.get_ranges([ByteRange(f"{number}", 10, 3)])
        assert data == bytes([number]) * 3
    for number in range(4):
        store.delete(f"{number}")
    assert list(cached.get_ranges([ByteRange("0", 0, 1), ByteRange("2", 0, 1)])) == [b"\0", b"\2"]
    with pytest.raises(CorruptCacheError, match=r"store/1 is missing"):
        list(cached.get_ranges([ByteRange("1", 0, 1)]))


@pytest.mark.parametrize(
    ("text", "size"), [("12", 12), ("2K", 2000), (" 500m", 5 * 10**8), ("50GB", 5 * 10**10)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "5X", "-1G", "1.5G", "１G"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a size"):
        parse_size(text)
