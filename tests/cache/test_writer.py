"""Shards are described as they are written, and read back to the same description."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddk_cache import CorruptCacheError
from ddk_cache.build.writer import ShardWriter
from ddk_cache.format.layout import object_name
from ddk_cache.format.plan import ShardKey
from ddk_cache.read.cache import Cache
from ddk_cache.storage.local import LocalStorage

KEY = ShardKey("web", "train", 1)


def test_a_shard_is_described_as_it_lies(cache: Cache, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    writer = ShardWriter(storage, cache.spec)
    rows = np.arange(3 * 17, dtype=np.uint16).reshape(3, 17)
    written = writer.write(KEY, {"tokens": rows})["tokens"]
    name = object_name(cache.spec, KEY, "tokens")
    assert (written.bytes, written.hash) == storage.hash(name)
    assert len(written.chunks) == 8 * cache.spec.chunks_per_shard
    read = writer.read(KEY, "tokens", 3)
    assert read.object == written
    np.testing.assert_array_equal(read.rows, rows)
    assert writer.read(KEY, "tokens", 8).rows[3:].min() == 2**16 - 1


def test_a_shard_that_is_missing_or_damaged_is_named(cache: Cache, tmp_path: Path) -> None:
    writer = ShardWriter(LocalStorage(tmp_path), cache.spec)
    with pytest.raises(CorruptCacheError, match="is missing"):
        writer.read(KEY, "tokens", 1)
    writer.write(KEY, {"tokens": np.zeros((1, 17), np.uint16)})
    path = tmp_path / object_name(cache.spec, KEY, "tokens")
    path.write_bytes(b"?" + path.read_bytes()[1:])
    with pytest.raises(CorruptCacheError, match=str(path)):
        writer.read(KEY, "tokens", 1)
