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
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np

from ddk_cache.errors import CorruptCacheError
from ddk_cache.format.commit import Record, read_record
from ddk_cache.format.layout import object_name
from ddk_cache.format.manifest import Manifest
from ddk_cache.format.plan import ShardKey
from ddk_cache.format.spec import ArrayLayout
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
"""Decoded chunks held in memory, so that rows of one chunk drawn soon after cost one read: a block
of the training order, of sixteen domains. About a quarter of a gigabyte."""

SHARDS_KEPT = 512
"""Records and indices of shards held in memory."""


class ChunkKey(NamedTuple):
    """The same chunk of some arrays of a split."""

    domain: str
    split: str
    number: int
    arrays: tuple[str, ...]


class Part(NamedTuple):
    """One array's part of a committed shard."""

    shard: Index
    name: str
    checksums: str
    """The committed crc32c of each chunk, eight hex digits each."""

    def range(self, place: int) -> ByteRange:
        """Return where a chunk of the shard lies, without the checksum behind it."""
        shard = self.shard
        return ByteRange(self.name, shard.offsets[place], shard.lengths[place] - CHECKSUM)

    def check(self, place: int, body: bytes, size: int) -> None:
        """Raise CorruptCacheError unless a chunk is the committed one and claims `size` bytes."""
        check(body, self.checksums[8 * place : 8 * place + 8], self.shard.where)
        check_size(body, self.shard.where, size)

    def decode(self, body: bytes, out: Array) -> None:
        """Write the values of a chunk that was checked to `out`."""
        decompress(body, self.shard.where, out)


class Chunk:
    """Decoded chunks, (chunk_rows, …) each as stored, in memory that is used again when they go."""

    __slots__ = ("_free", "arrays")

    def __init__(self, arrays: list[Array], free: list[list[Array]]) -> None:
        self.arrays, self._free = arrays, free

    def __del__(self) -> None:
        self._free.append(self.arrays)


class Room:
    """Memory for the chunks of some arrays.

    It is mapped, as much as was ever in use at once, whatever the size of the cache. Taken from
    the allocator, chunks that stay would lie between tensors that come and go, and its heap would
    grow well beyond what is held.
    """

    def __init__(self, rows: int, layouts: Sequence[ArrayLayout]) -> None:
        self.shapes = [((rows, *layout.inner), layout.dtype) for layout in layouts]
        self.sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes]
        self._free: list[list[Array]] = []

    def __call__(self) -> Chunk:
        """Return room for a chunk of each array."""
        try:
            return Chunk(self._free.pop(), self._free)
        except IndexError:
            return Chunk(self._map(), self._free)

    def _map(self) -> list[Array]:
        return [
            np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)
            for size, (shape, dtype) in zip(self.sizes, self.shapes, strict=True)
        ]


class Chunks:
    """The chunks of the committed shards of one cache."""

    def __init__(
        self, storage: Storage, manifest: Manifest, require: Callable[[ShardKey], None]
    ) -> None:
        """Ask `require` to raise for a shard that is not committed."""
        self.storage, self.manifest, self.require = storage, manifest, require
        self.spec = manifest.spec
        self._records = LRU(SHARDS_KEPT, self._read_records)
        self._shards = LRU(SHARDS_KEPT, self._read_shards)
        self._chunks = LRU(CHUNKS_KEPT, self._read_chunks)
        self._room = lru_cache(self._make_room)

    def __call__(self, keys: Sequence[ChunkKey]) -> list[Chunk]:
        """Return chunks, which nobody may change, nor keep their arrays without them.

        Raises:
            CorruptCacheError: stored bytes are not those that were committed.
        """
        return self._chunks(keys)

    def _make_room(self, arrays: tuple[str, ...]) -> Room:
        layouts = self.spec.arrays
        return Room(self.spec.chunk_rows, [layouts[name] for name in arrays])

    def _read_records(self, keys: Sequence[ShardKey]) -> Iterator[Record]:
        for key in keys:
            self.require(key)
            yield read_record(self.storage, self.manifest, key)

    def _read_shards(
        self, keys: Sequence[tuple[ShardKey, tuple[str, ...]]]
    ) -> Iterator[list[Part]]:
        records, length = self._records([key for key, _ in keys]), self._footer
        wanted, found, where = [], [], self.storage.uri
        for (key, arrays), record in zip(keys, records, strict=True):
            for array in arrays:
                name, entry = object_name(self.spec, key, array), record.objects[array]
                if entry.bytes < length:
                    raise CorruptCacheError(f"{self.storage.uri(name)} cannot be so short.")
                self.storage.check_size(name, entry.bytes)
                wanted.append(ByteRange(name, entry.bytes - length, length))
                found.append((name, entry))
        footers = self.storage.get_ranges(wanted)
        parts = (
            Part(Index.parse(where(name), entry.bytes, footer), name, entry.chunks)
            for (name, entry), footer in zip(found, footers, strict=True)
        )
        for _, arrays in keys:
            yield list(islice(parts, len(arrays)))

    def _read_chunks(self, keys: Sequence[ChunkKey]) -> Iterator[Chunk]:
        places = [divmod(key.number, self.spec.chunks_per_shard) for key in keys]
        shards = self._shards(
            [
                (ShardKey(key.domain, key.split, number), key.arrays)
                for key, (number, _) in zip(keys, places, strict=True)
            ]
        )
        found = [
            (parts, place, self._room(key.arrays))
            for key, parts, (_, place) in zip(keys, shards, places, strict=True)
        ]
        bodies = self.storage.get_ranges(
            part.range(place) for parts, place, _ in found for part in parts
        )
        for parts, place, room in found:
            taken = list(islice(bodies, len(parts)))
            for part, body, size in zip(parts, taken, room.sizes, strict=True):
                part.check(place, body, size)
            chunk = room()
            for part, body, out in zip(parts, taken, chunk.arrays, strict=True):
                part.decode(body, out)
            yield chunk

    @property
    def _footer(self) -> int:
        return footer_length(self.spec.chunks_per_shard)
