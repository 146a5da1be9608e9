"""Committed shards → chunks as they are stored: the direct reader of the one layout we write.

The record and the indices of a shard are read once, a chunk is one range, a checksum and one
decompression. That is a few times less work for each token than a general Zarr reader needs,
which asks for the index anew at every read; any Zarr reader still opens the same files. What a
caller needs is asked for together, so that a slow place is asked once, and any number of threads
may call. The price of keeping decoded chunks is their memory, `CHUNKS_KEPT` of each array.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ddk_cache.kept import Kept
from ddk_cache.manifest import Manifest
from ddk_cache.objects import Objects, Range
from ddk_cache.records import Record, object_name, read_record
from ddk_cache.schema import Array, ArrayLayout, CorruptCacheError, ShardKey
from ddk_cache.shards import CHECKSUM, Index, check, decompress, footer_length

CHUNKS_KEPT = 256
"""Decoded chunks of each array held in memory, so that rows of one chunk drawn soon after cost
one read: a block of the training order, of sixteen domains. About a quarter of a gigabyte."""

SHARDS_KEPT = 512
"""Records of shards held in memory, and indices of each array."""


class ChunkKey(NamedTuple):
    """A chunk of one array of a split, by its number in the array."""

    domain: str
    split: str
    array: str
    number: int


class Part(NamedTuple):
    """One array's part of a committed shard."""

    shard: Index
    name: str
    checksums: str
    """The committed crc32c of each chunk, eight hex digits each."""

    def range(self, place: int) -> Range:
        """Return where a chunk of the shard lies, without the checksum behind it."""
        offset, length = int(self.shard.offsets[place]), int(self.shard.lengths[place])
        return Range(self.name, offset, length - CHECKSUM)

    def committed(self, place: int) -> str:
        """Return the crc32c that a chunk of the shard was committed with."""
        return self.checksums[8 * place : 8 * place + 8]


class Room:
    """Memory for the chunks of one array, used again when nobody holds the chunk any more.

    The memory is mapped, as much as was ever in use at once, whatever the size of the cache. Taken
    from the allocator, chunks that stay would lie between tensors that come and go, and its heap
    would grow well beyond what is held.
    """

    def __init__(self, rows: int, layout: ArrayLayout) -> None:
        self.shape, self.dtype = (rows, *layout.inner), layout.dtype
        self.size = math.prod(self.shape) * layout.dtype.itemsize
        self._free: list[Array] = []

    def __call__(self) -> Array:
        """Return room for a chunk. It is free again when the array returned is gone."""
        try:
            memory = self._free.pop()
        except IndexError:
            mapped = mmap.mmap(-1, self.size)
            memory = np.frombuffer(mapped, self.dtype).reshape(self.shape)
        chunk = memory.view()
        weakref.finalize(chunk, self._free.append, memory).atexit = False
        return chunk


class Chunks:
    """The chunks of the committed shards of one cache."""

    def __init__(
        self, objects: Objects, manifest: Manifest, require: Callable[[ShardKey], None]
    ) -> None:
        """Ask `require` to raise for a shard that is not committed."""
        self.objects, self.manifest, self.require = objects, manifest, require
        self.spec = manifest.spec
        arrays, rows = len(self.spec.arrays), self.spec.chunk_rows
        self._rooms = {name: Room(rows, layout) for name, layout in self.spec.arrays.items()}
        self._records = Kept(SHARDS_KEPT, self._read_records)
        self._parts = Kept(SHARDS_KEPT * arrays, self._read_parts)
        self._chunks = Kept(CHUNKS_KEPT * arrays, self._read_chunks)

    def __call__(self, keys: Sequence[ChunkKey]) -> list[Array]:
        """Return chunks as stored, (chunk_rows, …) each. Nobody may change them.

        Raises:
            CorruptCacheError: stored bytes are not those that were committed.
        """
        return self._chunks(keys)

    def _read_records(self, keys: Sequence[ShardKey]) -> Iterator[Record]:
        for key in keys:
            self.require(key)
            yield read_record(self.objects, self.manifest, key)

    def _read_parts(self, keys: Sequence[tuple[ShardKey, str]]) -> Iterator[Part]:
        records, length = self._records([key for key, _ in keys]), self._footer
        wanted, parts = [], []
        for (key, array), record in zip(keys, records, strict=True):
            name, entry = object_name(self.spec, key, array), record.objects[array]
            if entry.bytes < length:
                raise CorruptCacheError(f"{self.objects.where(name)} cannot be so short.")
            self.objects.check(name, entry.bytes)
            wanted.append(Range(name, entry.bytes - length, length))
            parts.append((name, entry))
        for (name, entry), footer in zip(parts, self.objects.ranges(wanted), strict=True):
            index = Index.parse(self.objects.where(name), entry.bytes, footer)
            yield Part(index, name, entry.chunks)

    def _read_chunks(self, keys: Sequence[ChunkKey]) -> Iterator[Array]:
        places = [divmod(key.number, self.spec.chunks_per_shard) for key in keys]
        parts = self._parts(
            [
                (ShardKey(key.domain, key.split, shard), key.array)
                for key, (shard, _) in zip(keys, places, strict=True)
            ]
        )
        wanted = (part.range(place) for part, (_, place) in zip(parts, places, strict=True))
        found = zip(keys, places, parts, self.objects.ranges(wanted), strict=True)
        for key, (_, place), part, body in found:
            check(body, part.committed(place), part.shard.where)
            room = self._rooms[key.array]
            yield decompress(body, part.shard.where, room.size, room)

    @property
    def _footer(self) -> int:
        return footer_length(self.spec.chunks_per_shard)
