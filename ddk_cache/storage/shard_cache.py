"""A wrapper that keeps whole shards of a slow storage in a local directory.

A training run touches every shard many times, a few chunks at a time; with room for its shards on
a local disk it fetches each once. The price is a first read of the whole shard. A copy appears at
once by renaming, is checked against the record like any other bytes, and the least recently used
copies are evicted when the directory is full. Two threads may fetch the same shard; both get it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from threading import Lock

from ddk_cache import atomic
from ddk_cache.errors import CorruptCacheError, InputError
from ddk_cache.hashing import digest
from ddk_cache.storage.base import ByteRange, Storage
from ddk_cache.storage.local import Handle
from ddk_cache.storage.pool import Pool

SUFFIX = ".shard"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

FETCHES = 16
"""Shards fetched at the same time, each of which is held in memory meanwhile."""


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 500M or 50G. Raises InputError on anything else."""
    found = re.fullmatch(r"([0-9]+)([KMGT]?)B?", text.strip().upper())
    if not found:
        raise InputError(
            f"shard cache: {text!r} is not a size. Give bytes or, for example, 500M or 50G."
        )
    return int(found[1]) * UNITS[found[2]]


class ShardCache:
    """Another storage, its ranges read from copies of at most `size` bytes in all."""

    def __init__(self, storage: Storage, folder: Path, size: int) -> None:
        self.storage, self.folder, self.size = storage, folder, size
        self._pool = Pool(FETCHES)
        self._lock = Lock()
        folder.mkdir(parents=True, exist_ok=True)
        # Everything except ranges is the storage's own.
        self.lists, self.uri, self.hash = storage.lists, storage.uri, storage.hash
        self.exists, self.exist_many = storage.exists, storage.exist_many
        self.get, self.get_many = storage.get, storage.get_many
        self.get_with_age, self.check_size = storage.get_with_age, storage.check_size
        self.list_dir, self.list_prefix = storage.list_dir, storage.list_prefix
        self.put, self.put_if_absent = storage.put, storage.put_if_absent
        self.put_file, self.clean_up = storage.put_file, storage.clean_up
        self.delete, self.delete_dir = storage.delete, storage.delete_dir

    def __reduce__(self) -> tuple[type[ShardCache], tuple[Storage, Path, int]]:
        return ShardCache, (self.storage, self.folder, self.size)

    @property
    def scratch(self) -> Path:
        """Return the scratch of the storage."""
        return self.storage.scratch

    def get_ranges(self, wanted: Iterable[ByteRange]) -> Iterator[bytes]:
        """Read ranges from the copies, each fetched as a whole if there is none."""
        groups = [list(group) for _, group in groupby(wanted, key=lambda part: part.name)]
        for parts in self._pool.map(self._ranges, groups):
            yield from parts

    def _ranges(self, group: Sequence[ByteRange]) -> list[bytes]:
        copy = self._copy(group[0].name)
        return [copy.read(part.offset, part.length) for part in group]

    def _copy(self, name: str) -> Handle:
        """Return the open copy of an object, fetched if there is none."""
        path = self.folder / (digest(self.uri(name).encode()) + SUFFIX)
        with self._lock:
            if path.exists():
                _touch(path)
                return Handle(str(path))
        data = self.get(name)
        if data is None:
            raise CorruptCacheError(f"{self.uri(name)} is missing.")
        with self._lock:
            atomic.replace(path, data)
            _touch(path)
            handle = Handle(str(path))
            self._make_room(path)
        return handle

    def _make_room(self, newest: Path) -> None:
        """Remove the least recently used copies until all fit; the newest stays."""
        found = [(path, path.stat()) for path in self.folder.glob(f"*{SUFFIX}")]
        held = sum(status.st_size for _, status in found)
        for path, status in sorted(found, key=lambda entry: entry[1].st_mtime_ns):
            if held <= self.size or path == newest:
                continue
            path.unlink(missing_ok=True)
            held -= status.st_size

    def close(self) -> None:
        """End the threads, and close the storage."""
        self._pool.close()
        self.storage.close()


def _touch(path: Path) -> None:
    """Note that a copy is used now, finer than the clock of the file system."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))
