"""Committed shards → decoded chunks: the direct reader of the one layout that we write.

What no general Zarr reader does is check each chunk against its commit record, so a chunk is one
range, one checksum and one decompression. Three caches follow from each other:

    record of a shard  →  index of one array of it  →  decoded chunk

A call asks each of them once for everything that it misses, so that the requests to an object
store overlap; any number of threads may call. Any Zarr reader still opens the same files. The
price of keeping decoded chunks is their memory, `CHUNKS_KEPT` of each array.
"""

from __future__ import annotations

import math
import mmap
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ddk_cache.errors import CorruptCacheError
from ddk_cache.format.commit import Record, read_records
from ddk_cache.format.layout import object_name
from ddk_cache.format.manifest import Manifest
from ddk_cache.format.plan import ShardKey
from ddk_cache.format.zarr_shard import (
    CHECKSUM,
    Index,
    check,
    check_size,
    decompress,
    footer_length,
)
from ddk_cache.read.lru import LRU
from ddk_cache.storage.base import ByteRange, Storage
from ddk_cache.types import Array

CHUNKS_KEPT = 256
"""Decoded chunks of each array held in memory, so that rows of one chunk drawn soon after each
other cost one read: a block of the training order, of sixteen domains. About 0.25 GB."""

SHARDS_KEPT = 512
"""Shards whose records and indices are held in memory."""


class ChunkKey(NamedTuple):
    """One chunk of one array of a split, by its number in the array."""

    domain: str
    split: str
    number: int
    array: str


class ArrayShard(NamedTuple):
    """One committed file: where its chunks lie, and which checksums were committed for them."""

    name: str
    layout: Index
    checksums: str
    """The crc32c of each chunk, eight hex digits each."""

    def range(self, place: int) -> ByteRange:
        """Return where a chunk of the shard lies, without the checksum behind it."""
        offset, length = self.layout.offsets[place], self.layout.lengths[place]
        return ByteRange(self.name, offset, length - CHECKSUM)

    def check(self, place: int, body: bytes, size: int) -> None:
        """Raise CorruptCacheError unless a chunk is the committed one and claims `size` bytes."""
        check(body, self.checksums[8 * place : 8 * place + 8], self.layout.where)
        check_size(body, self.layout.where, size)


class Chunk:
    """The values of a chunk, (chunk_rows, …) as stored; with the object goes their memory."""

    __slots__ = ("_free", "values")

    def __init__(self, values: Array, free: list[Array]) -> None:
        self.values, self._free = values, free

    def __del__(self) -> None:
        self._free.append(self.values)


class Chunks:
    """The chunks of the committed shards of one cache."""

    def __init__(
        self, storage: Storage, manifest: Manifest, require: Callable[[ShardKey], None]
    ) -> None:
        """Read from a storage; `require` raises for a shard that is not committed."""
        self.storage, self.manifest, self.require = storage, manifest, require
        self.spec, self.layouts = manifest.spec, manifest.spec.arrays
        arrays = len(self.layouts)
        self._records = LRU(SHARDS_KEPT, self._read_records)
        self._shards = LRU(SHARDS_KEPT * arrays, self._read_shards)
        self._chunks = LRU(CHUNKS_KEPT * arrays, self._read_chunks)
        self._free: defaultdict[str, list[Array]] = defaultdict(list)

    def __call__(self, keys: Sequence[ChunkKey]) -> list[Chunk]:
        """Return chunks. Nobody may change one, nor keep its values longer than the chunk itself.

        Raises:
            CorruptCacheError: stored bytes are not those that were committed.
        """
        return self._chunks(keys)

    def _read_records(self, keys: Sequence[ShardKey]) -> Iterator[Record]:
        for key in keys:
            self.require(key)
        return read_records(self.storage, self.manifest, keys)

    def _read_shards(self, keys: Sequence[tuple[ShardKey, str]]) -> Iterator[ArrayShard]:
        """Read the index at the end of each file."""
        length = footer_length(self.spec.chunks_per_shard)
        records = self._records([shard for shard, _ in keys])
        names = [object_name(self.spec, shard, array) for shard, array in keys]
        objects = [record.objects[array] for record, (_, array) in zip(records, keys, strict=True)]
        for name, entry in zip(names, objects, strict=True):
            if entry.bytes < length:
                raise CorruptCacheError(f"{self.storage.uri(name)} is too short for its index.")
            self.storage.check_size(name, entry.bytes)
        footers = self.storage.get_ranges(
            ByteRange(name, entry.bytes - length, length)
            for name, entry in zip(names, objects, strict=True)
        )
        for name, entry, footer in zip(names, objects, footers, strict=True):
            index = Index.parse(self.storage.uri(name), entry.bytes, footer)
            yield ArrayShard(name, index, entry.chunks)

    def _read_chunks(self, keys: Sequence[ChunkKey]) -> Iterator[Chunk]:
        """Read, check and decompress chunks."""
        places = [divmod(key.number, self.spec.chunks_per_shard) for key in keys]
        shards = self._shards(
            [
                (ShardKey(key.domain, key.split, shard), key.array)
                for key, (shard, _) in zip(keys, places, strict=True)
            ]
        )
        bodies = self.storage.get_ranges(
            shard.range(place) for shard, (_, place) in zip(shards, places, strict=True)
        )
        for key, shard, (_, place), body in zip(keys, shards, places, bodies, strict=True):
            # Memory is taken only after the chunk has shown that it fills it.
            shard.check(place, body, self._size(key.array))
            chunk = self._room(key.array)
            decompress(body, shard.layout.where, chunk.values)
            yield chunk

    def _size(self, array: str) -> int:
        """Return the bytes of a decoded chunk."""
        layout = self.layouts[array]
        return self.spec.chunk_rows * math.prod(layout.inner) * layout.dtype.itemsize

    def _room(self, array: str) -> Chunk:
        """Return memory for a chunk: that of one that is gone, or new.

        New memory is mapped, not allocated. Between tensors that come and go, chunks that stay
        would make the allocator's heap grow well beyond what is held. The mapping is private, so
        that a forked process does not write into the chunks of its parent.
        """
        free = self._free[array]
        try:
            return Chunk(free.pop(), free)
        except IndexError:
            layout = self.layouts[array]
            memory = mmap.mmap(-1, self._size(array), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            values = np.frombuffer(memory, layout.dtype)
            return Chunk(values.reshape(self.spec.chunk_rows, *layout.inner), free)

    def close(self) -> None:
        """Free the memory of all chunks that nobody holds."""
        self._chunks.clear()
        self._free.clear()
