"""Committed shards → decoded chunks: the direct reader of the one layout that we write.

What no general Zarr reader does is check each chunk against its commit record, so a chunk is one
range, one checksum and one decompression. Three caches follow from each other:

    record of a shard  →  indices of its arrays  →  decoded chunk of these arrays

A call asks each of them once for everything that it misses, so that the requests to an object
store overlap; any number of threads may call. Any Zarr reader still opens the same files. The
arrays that a caller reads together are kept together: one look-up per row is cheaper than one per
array and row. The price is memory, `CHUNKS_KEPT` chunks, and an array is kept twice where it is
read in two combinations.
"""

from __future__ import annotations

import itertools
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
"""Decoded chunks held in memory, so that rows of one chunk drawn soon after each
other cost one read: a block of the training order, of sixteen domains. About 0.25 GB."""

SHARDS_KEPT = 512
"""Shards whose records and indices are held in memory."""


class ChunkKey(NamedTuple):
    """The chunk of some arrays of a split, by its number."""

    domain: str
    split: str
    number: int
    arrays: tuple[str, ...]


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
    """The values of some arrays in a chunk, (chunk_rows, …) each; their memory is reused."""

    __slots__ = ("_free", "values")

    def __init__(self, values: list[Array], free: list[list[Array]]) -> None:
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
        self.per_shard = manifest.spec.chunks_per_shard
        rows = manifest.spec.chunk_rows
        self.shapes = {name: (rows, *a.inner) for name, a in manifest.spec.arrays.items()}
        self.dtypes = {name: layout.dtype for name, layout in manifest.spec.arrays.items()}
        self.sizes = {
            name: math.prod(shape) * self.dtypes[name].itemsize
            for name, shape in self.shapes.items()
        }
        self._records = LRU(SHARDS_KEPT, self._read_records)
        self._shards = LRU(SHARDS_KEPT, self._read_shards)
        self._chunks = LRU(CHUNKS_KEPT, self._read_chunks)
        self._free: defaultdict[tuple[str, ...], list[list[Array]]] = defaultdict(list)

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

    def _read_shards(
        self, keys: Sequence[tuple[ShardKey, tuple[str, ...]]]
    ) -> Iterator[list[ArrayShard]]:
        """Read the index at the end of each file."""
        length = footer_length(self.per_shard)
        records = self._records([shard for shard, _ in keys])
        objects = [
            (object_name(self.manifest.spec, shard, array), record.objects[array])
            for (shard, arrays), record in zip(keys, records, strict=True)
            for array in arrays
        ]
        for name, entry in objects:
            if entry.bytes < length:
                raise CorruptCacheError(f"{self.storage.uri(name)} is too short for its index.")
            self.storage.check_size(name, entry.bytes)
        footers = self.storage.get_ranges(
            ByteRange(name, entry.bytes - length, length) for name, entry in objects
        )
        found = (
            ArrayShard(name, Index.parse(self.storage.uri(name), entry.bytes, footer), entry.chunks)
            for (name, entry), footer in zip(objects, footers, strict=True)
        )
        for _, arrays in keys:
            yield list(itertools.islice(found, len(arrays)))

    def _read_chunks(self, keys: Sequence[ChunkKey]) -> Iterator[Chunk]:
        """Read, check and decompress chunks."""
        shards = self._shards(
            [
                (ShardKey(domain, split, number // self.per_shard), arrays)
                for domain, split, number, arrays in keys
            ]
        )
        places = [key.number % self.per_shard for key in keys]
        bodies = self.storage.get_ranges(
            array.range(place)
            for shard, place in zip(shards, places, strict=True)
            for array in shard
        )
        for key, shard, place in zip(keys, shards, places, strict=True):
            parts = list(itertools.islice(bodies, len(shard)))
            # Memory is taken only after the chunk has shown that it fills it.
            for name, array, body in zip(key.arrays, shard, parts, strict=True):
                array.check(place, body, self.sizes[name])
            chunk = self._room(key.arrays)
            for array, body, values in zip(shard, parts, chunk.values, strict=True):
                decompress(body, array.layout.where, values)
            yield chunk

    def _room(self, arrays: tuple[str, ...]) -> Chunk:
        """Return memory for a chunk: that of one that is gone, or new.

        New memory is mapped, not allocated. Between tensors that come and go, chunks that stay
        would make the allocator's heap grow well beyond what is held. The mapping is private, so
        that a forked process does not write into the chunks of its parent.
        """
        free = self._free[arrays]
        try:
            return Chunk(free.pop(), free)
        except IndexError:
            return Chunk([self._map(name) for name in arrays], free)

    def _map(self, name: str) -> Array:
        memory = mmap.mmap(-1, self.sizes[name], mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(memory, self.dtypes[name]).reshape(self.shapes[name])

    def close(self) -> None:
        """Free the memory of all chunks that nobody holds."""
        self._chunks.clear()
        self._free.clear()
