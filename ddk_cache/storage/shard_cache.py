"""An object store beside a local directory that keeps the shards read last, whole.

A training run touches every shard many times, a few chunks at a time; with room for its shards on
a local disk it fetches each once. The price is a first read of the whole shard. A copy appears at
once by renaming, is checked against the record like any other bytes, and the copies used least
lately go when the directory is full. Two threads may fetch the same shard; both get it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from ddk_cache import atomic
from ddk_cache.errors import CorruptCacheError, InputError
from ddk_cache.hashing import digest
from ddk_cache.storage.base import ByteRange
from ddk_cache.storage.local import Handle
from ddk_cache.storage.remote import RemoteStorage

SUFFIX = ".shard"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 500M or 50G. Raises InputError on anything else."""
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", text.strip().upper())
    if not found:
        raise InputError(f"{text!r} is no size. Give bytes or, for example, 500M or 50G.")
    return int(found[1]) * UNITS[found[2]]


class ShardCache(RemoteStorage):
    """What lies below a URL, its shards by way of a directory of at most `size` bytes."""

    def __init__(self, url: str, folder: Path, size: int) -> None:
        super().__init__(url)
        self.folder, self.size = folder, size
        self._lock = Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def _ranges(self, group: Sequence[ByteRange]) -> list[bytes]:
        copy = self._copy(group[0].name)
        return [copy.read(part.offset, part.length) for part in group]

    def _copy(self, name: str) -> Handle:
        """Return the open copy of an object, fetched if there is none."""
        path = self.folder / (digest(self.uri(name).encode()) + SUFFIX)
        with self._lock:
            if path.exists():
                os.utime(path)
                return Handle(str(path))
        data = self.get(name)
        if data is None:
            raise CorruptCacheError(f"{self.uri(name)} is missing.")
        with self._lock:
            atomic.replace(path, data)
            handle = Handle(str(path))
            self._make_room(path)
        return handle

    def _make_room(self, newest: Path) -> None:
        """Remove the copies used least lately until all fit; the newest stays."""
        found = [(path, path.stat()) for path in self.folder.glob(f"*{SUFFIX}")]
        held = sum(status.st_size for _, status in found)
        for path, status in sorted(found, key=lambda entry: entry[1].st_mtime_ns):
            if held <= self.size or path == newest:
                continue
            path.unlink(missing_ok=True)
            held -= status.st_size
