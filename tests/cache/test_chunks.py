"""The direct reader: what is read, how often, and into which memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from ddk_cache import Cache, UnfinishedCacheError
from ddk_cache.format.plan import ShardKey
from ddk_cache.read.chunks import ChunkKey, Chunks
from ddk_cache.read.lru import LRU
from ddk_cache.storage.base import ByteRange
from ddk_cache.storage.local import LocalStorage


class Counted(LocalStorage):
    """A directory that notes what is asked of it."""

    def get_ranges(self, wanted: Iterable[ByteRange]) -> Iterator[bytes]:
        """Note the names of each request."""
        asked = list(wanted)
        self.asked = [*getattr(self, "asked", []), [part.name for part in asked]]
        return super().get_ranges(asked)


@pytest.fixture
def storage(cache: Cache) -> Counted:
    return Counted(cache.root)


@pytest.fixture
def chunks(cache: Cache, storage: Counted) -> Chunks:
    return Chunks(storage, cache.manifest, lambda key: None)


def key(number: int, *arrays: str) -> ChunkKey:
    return ChunkKey("letters", "train", number, arrays or ("tokens",))


def test_what_is_missing_is_asked_for_together_and_once(chunks: Chunks, storage: Counted) -> None:
    wanted = [key(n, "tokens", "target_ids") for n in (0, 1, 9, 1)]
    chunks(wanted)
    indices, bodies = storage.asked
    assert len(indices) == len(set(indices)) == 4  # two shards of two arrays
    assert len(bodies) == 6
    assert not any("loss_mask" in name for name in bodies)
    chunks(wanted)
    assert len(storage.asked) == 2
    chunks([key(2, "tokens", "target_ids"), key(0, "tokens", "target_ids")])
    assert len(storage.asked) == 3  # the indices are known, and one of the chunks


def test_chunks_hold_the_rows_of_the_cache(cache: Cache, chunks: Chunks) -> None:
    found = np.concatenate([chunk.values[0] for chunk in chunks([key(n) for n in range(4)])])
    stored = cache.read_stored("letters", "train", range(8), ["tokens"])["tokens"]
    np.testing.assert_array_equal(found, stored)


def test_memory_is_used_again_but_never_while_somebody_holds_it(chunks: Chunks) -> None:
    chunks._chunks = LRU(1, chunks._read_chunks)
    (held,) = chunks([key(0)])
    before, at = held.values[0].copy(), held.values[0].ctypes.data
    others = {chunks([key(n)])[0].values[0].ctypes.data for n in range(1, 6)}
    assert at not in others
    assert len(others) <= 2
    np.testing.assert_array_equal(held.values[0], before)
    del held
    assert at in {chunk.values[0].ctypes.data for chunk in chunks([key(1), key(2)])}


def test_a_shard_without_a_record_is_not_read(cache: Cache, storage: Counted) -> None:
    def refuse(shard: ShardKey) -> None:
        raise UnfinishedCacheError(str(shard))

    with pytest.raises(UnfinishedCacheError, match="letters/train/0"):
        Chunks(storage, cache.manifest, refuse)([key(0)])
    assert not hasattr(storage, "asked")
