"""A Zarr shard as bytes: its index, and its chunks with their checksums.

The sharding codec of Zarr v3 ends a shard with an index: offset and length of each chunk as
uint64, then a crc32c of the index. Each of our chunks ends with a crc32c of its own. Everything
is checked before it is used, so that no number in a damaged file decides how much is read or
allocated. The price of our own reader is that it reads this one layout only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import google_crc32c
import numcodecs.blosc
import numpy as np

from ddk_cache.errors import CorruptCacheError
from ddk_cache.types import Array

CHECKSUM = 4
"""Bytes of a crc32c."""

BLOSC_HEADER = struct.Struct("<4xIII")
"""Header of a chunk: versions and flags, then bytes before, of a block, and after compression."""


def footer_length(chunks: int) -> int:
    """Return the bytes of the index of a shard of so many chunks."""
    return 16 * chunks + CHECKSUM


@dataclass(frozen=True)
class Index:
    """Where the chunks of a shard lie, each with the checksum behind it."""

    where: str
    """The path or URL of the shard, for messages."""
    offsets: list[int]
    lengths: list[int]

    @classmethod
    def parse(cls, where: str, size: int, footer: bytes) -> Index:
        """Read the last bytes of a shard of `size` bytes.

        Raises:
            CorruptCacheError: the index fails its checksum, lacks a chunk or points outside.
        """
        index = np.frombuffer(unwrap(footer, where), "<u8").reshape(-1, 2)
        room = size - len(footer)
        if (index > room).any() or (index.sum(1) > room).any() or (index[:, 1] < CHECKSUM).any():
            raise CorruptCacheError(
                f"the index of {where} lacks a chunk or points outside of the file."
            )
        return cls(where, index[:, 0].tolist(), index[:, 1].tolist())


def index_of(shard: bytes, where: str, chunks: int) -> Index:
    """Return the index of a whole shard of so many chunks.

    Raises:
        CorruptCacheError: it is cut short; or see `Index.parse`.
    """
    length = footer_length(chunks)
    if len(shard) < length:
        raise CorruptCacheError(f"{where} is cut short: {len(shard):,} bytes.")
    return Index.parse(where, len(shard), shard[-length:])


def checksums(shard: bytes, where: str, chunks: int) -> str:
    """Return the crc32c of every chunk of a shard as they stand in it, eight hex digits each."""
    index = index_of(shard, where, chunks)
    ends = map(int.__add__, index.offsets, index.lengths)
    return "".join(shard[end - CHECKSUM : end][::-1].hex() for end in ends)


def bodies(shard: bytes, where: str, chunks: int) -> Iterator[bytes]:
    """Yield the compressed chunks of a whole shard. CorruptCacheError: a checksum fails."""
    index = index_of(shard, where, chunks)
    for offset, length in zip(index.offsets, index.lengths, strict=True):
        yield unwrap(shard[offset : offset + length], where)


def decode(shard: bytes, where: str, chunks: int, out: Array) -> None:
    """Write the values of a whole shard to `out`, (rows, …). CorruptCacheError: it is damaged."""
    parts = np.split(out, chunks)
    for body, part in zip(bodies(shard, where, chunks), parts, strict=True):
        check_size(body, where, part.nbytes)
        decompress(body, where, part)


def unwrap(data: bytes, where: str) -> bytes:
    """Check the four bytes that the crc32c codec appends; return the others."""
    body, stored = data[:-CHECKSUM], data[-CHECKSUM:][::-1].hex()
    check(body, stored, where)
    return body


def check(body: bytes, expected: str, where: str) -> None:
    """Raise CorruptCacheError unless bytes have a crc32c, eight hex digits."""
    found = f"{google_crc32c.value(body):08x}"
    if found != expected:
        raise CorruptCacheError(
            f"{where} is damaged, or not the shard that was committed: a chunk has the checksum "
            f"{found}, expected {expected}."
        )


def check_size(body: bytes, where: str, size: int) -> None:
    """Raise CorruptCacheError unless a chunk claims to hold so many bytes."""
    if len(body) < BLOSC_HEADER.size:
        raise CorruptCacheError(f"a chunk of {where} is damaged: it has {len(body)} bytes.")
    claimed, _, packed = BLOSC_HEADER.unpack_from(body)
    if (claimed, packed) != (size, len(body)):
        raise CorruptCacheError(
            f"a chunk of {where} is damaged: it claims {claimed:,} bytes, expected {size:,}."
        )


def decompress(body: bytes, where: str, out: Array) -> None:
    """Decompress a chunk whose size was checked. Raises CorruptCacheError where it is damaged."""
    try:
        numcodecs.blosc.decompress(body, out)
    except (RuntimeError, ValueError) as error:
        raise CorruptCacheError(f"a chunk of {where} is damaged: {error}.") from error
