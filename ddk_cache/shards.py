"""A Zarr shard as bytes: its index, and its chunks with their checksums.

The sharding codec of Zarr v3 ends a shard with an index: offset and length of each chunk as
uint64, then a crc32c of the index. Each of our chunks ends with a crc32c of its own. Everything
is checked before it is used, so that no number in a damaged file decides how much is read or
allocated.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numcodecs.blosc
import numpy as np

from ddk_cache.objects import pread
from ddk_cache.schema import Array, ArrayLayout, CorruptCacheError

BLOSC_HEADER = struct.Struct("<4xIII")
"""Of a chunk: versions and flags, then bytes before, of a block, and after compression."""


def footer_length(chunks: int) -> int:
    """Return the bytes of the index of a shard of so many chunks."""
    return 16 * chunks + 4


@dataclass(frozen=True)
class Index:
    """Where the chunks of a shard lie."""

    where: str
    """Of the shard, for people."""
    offsets: Array
    lengths: Array

    @classmethod
    def parse(cls, where: str, size: int, footer: bytes) -> Index:
        """Read the last bytes of a shard of `size` bytes.

        Raises:
            CorruptCacheError: the index fails its checksum, lacks a chunk or points outside.
        """
        index = np.frombuffer(check(footer, where), "<u8").reshape(-1, 2)
        room = size - len(footer)
        if (index > room).any() or (index.sum(1) > room).any() or (index[:, 1] < 4).any():
            raise CorruptCacheError(
                f"the index of {where} lacks a chunk or points outside of the file."
            )
        return cls(where, index[:, 0].astype(np.int64), index[:, 1].astype(np.int64))

    def chunk(self, number: int) -> bytes:
        """Return the compressed bytes of a chunk of a local shard, checked."""
        data = pread(self.where, int(self.offsets[number]), int(self.lengths[number]))
        check(data, self.where)
        return data

    def checksums(self) -> str:
        """Return the stored crc32c of every chunk of a local shard, joined."""
        ends = self.offsets + self.lengths
        return "".join(checksum(pread(self.where, int(end) - 4, 4)) for end in ends)


def index_of(path: Path, chunks: int) -> Index:
    """Read the index of a local shard of so many chunks.

    Raises:
        CorruptCacheError: the file is missing, a link, cut short; or see `Index.parse`.
    """
    if path.is_symlink() or not path.is_file():
        raise CorruptCacheError(f"{path} is missing, or not a plain file.")
    size, length = path.stat().st_size, footer_length(chunks)
    if size < length:
        raise CorruptCacheError(f"{path} is cut short: {size:,} bytes.")
    return Index.parse(str(path), size, pread(str(path), size - length, length))


def checksum(data: bytes) -> str:
    """Return the crc32c that some bytes end with, eight hex digits."""
    return data[:-5:-1].hex()


def check(data: bytes, where: str) -> Array:
    """Check the four bytes that the crc32c codec appends; return a view of the others, uint8."""
    body = np.frombuffer(data, np.uint8, max(len(data) - 4, 0))
    found, stored = f"{google_crc32c.value(body):08x}", checksum(data)
    if found != stored:
        raise CorruptCacheError(f"{where} is damaged: checksum {found}, stored {stored}.")
    return body


def decode(data: bytes, where: str, rows: int, layout: ArrayLayout) -> Array:
    """Return the (rows, …) values of a chunk, after its checksum and the size that it claims.

    Raises:
        CorruptCacheError: it is damaged, no blosc chunk, or of another size.
    """
    body, shape = check(data, where), (rows, *layout.inner)
    size = math.prod(shape) * layout.dtype.itemsize
    try:
        claimed, _, packed = BLOSC_HEADER.unpack_from(data)
        if (claimed, packed) != (size, len(body)):
            raise ValueError(f"it claims {claimed:,} bytes where {size:,} belong")
        out = np.empty(shape, layout.dtype)
        numcodecs.blosc.decompress(body, out)
    except (RuntimeError, ValueError, struct.error) as error:
        raise CorruptCacheError(f"a chunk of {where} is damaged: {error}.") from error
    return out
