"""Files that appear whole or not at all, and their hashes.

Every replacement goes through a temporary file, fsync, rename and an fsync of the directory:
slower than a plain write by a few milliseconds, and safe against kill -9 and a loss of power.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from ddk_cache import owner

PARTIAL = ".partial"
"""Suffix of a temporary file or directory. The name before it says which process made it."""


def replace(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which holds the old or the new bytes at every moment."""
    with _written(path, data) as partial:
        partial.replace(path)
    sync(path.parent)


def create(path: Path, data: bytes, *, flush: bool = True) -> bool:
    """Write `data` to `path`; False, changing nothing, where something is there.

    Without `flush` a loss of power may take it away again.
    """
    with _written(path, data, flush) as partial:
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
    if flush:
        sync(path.parent)
    return True


@contextmanager
def _written(path: Path, data: bytes, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary file beside `path` that holds `data`, and remove it afterwards."""
    partial = path.with_name(f"{path.name}~{owner.current()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def sweep(top: Path) -> None:
    """Remove the temporary files of dead processes below a directory, and no other file."""
    for folder, _, names in os.walk(top):  # tolerates folders deleted during the walk
        for path in (Path(folder, name) for name in names):
            who = maker(path.name)
            if who and not owner.alive(who, owner.age(path)):
                path.unlink(missing_ok=True)


def maker(name: str) -> str | None:
    """Return the process that made a temporary file, by its name; None where it is not such."""
    _, mark, who = name.removesuffix(PARTIAL).rpartition("~")
    return who if name.endswith(PARTIAL) and mark and owner.is_name(who) else None


def sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(top: Path) -> None:
    """Flush everything below a directory, and the directory itself."""
    for path in top.rglob("*"):
        sync(path)
    sync(top)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; afterwards it is flushed and takes the name `path`.

    What stood at `path` before is replaced. After an error it still stands, and what was written
    is removed.
    """
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    sync(path.parent)


def hash_file(path: Path) -> tuple[int, str]:
    """Return size in bytes and xxh3-128 hash of a file, read in pieces into one buffer.

    A fresh buffer for each piece would cost more than the hash: its pages must be mapped.
    """
    state, size = xxhash.xxh3_128(), 0
    piece = memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(piece):
            state.update(piece[:read])
            size += read
    return size, state.hexdigest()
