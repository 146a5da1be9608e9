"""A Zarr shard as a file: its index, and its chunks with their checksums.

The sharding codec of Zarr v3 ends a shard with an index: offset and length of each chunk as
uint64, then a crc32c of the index. Each of our chunks ends with a crc32c of its own. Everything
is checked before it is used, so that no number in a damaged file decides how much is read or
allocated.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from ddk_cache.schema import Array, CorruptCacheError


@dataclass(frozen=True)
class Index:
    """Where the chunks of a shard lie."""

    path: Path
    offsets: Array
    lengths: Array

    def chunk(self, number: int) -> tuple[bytes, str]:
        """Return the compressed bytes of a chunk and their crc32c, eight hex digits."""
        data = pread(self.path, int(self.offsets[number]), int(self.lengths[number]))
        return unwrap(data, self.path)

    def checksums(self) -> str:
        """Return the stored crc32c of every chunk, joined."""
        ends = self.offsets + self.lengths
        return "".join(pread(self.path, int(end) - 4, 4)[::-1].hex() for end in ends)


def index_of(path: Path, chunks: int) -> Index:
    """Read the index of a shard of so many chunks.

    Raises:
        CorruptCacheError: the file is missing, a link, cut short, or the index fails its
            checksum, lacks a chunk or points outside of the file.
    """
    if path.is_symlink() or not path.is_file():
        raise CorruptCacheError(f"{path} is missing, or not a plain file.")
    size, length = path.stat().st_size, 16 * chunks + 4
    if size < length:
        raise CorruptCacheError(f"{path} is cut short: {size:,} bytes.")
    footer, _ = unwrap(pread(path, size - length, length), path)
    index = np.frombuffer(footer, "<u8").reshape(chunks, 2)
    room = size - length
    if (index > room).any() or (index.sum(1) > room).any() or (index[:, 1] < 4).any():
        raise CorruptCacheError(f"the index of {path} lacks a chunk or points outside of the file.")
    return Index(path, index[:, 0].astype(np.int64), index[:, 1].astype(np.int64))


def pread(path: Path, offset: int, length: int) -> bytes:
    """Read a range of a file; CorruptCacheError where it is not all there."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise CorruptCacheError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        data = os.pread(handle, length, offset)
    finally:
        os.close(handle)
    if len(data) != length:
        raise CorruptCacheError(f"{path} is cut short: {len(data):,} of {length:,} bytes.")
    return data


def unwrap(data: bytes, path: Path) -> tuple[bytes, str]:
    """Check the four bytes that the crc32c codec appends; return the rest, and them in hex."""
    body, stored = data[:-4], data[-4:][::-1].hex()
    found = f"{google_crc32c.value(body):08x}"
    if found != stored:
        raise CorruptCacheError(f"{path} is damaged: checksum {found}, stored {stored}.")
    return body, stored
