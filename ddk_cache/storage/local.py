"""A directory as storage: a range is one `pread`, and an object appears by flush and rename.

The files read last stay open, few enough for any limit. Nothing is read or written through a link
that leads out of the directory, which costs a look at each folder, once.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from ddk_cache import atomic, owner
from ddk_cache.errors import CorruptCacheError
from ddk_cache.storage.base import LEASES, SCRATCH, ByteRange

FILES_OPEN = 256
"""Files kept open; the usual limit of a process is 1,024."""

FOLDERS_KEPT = 4096
"""Folders of which it is remembered whether they lie within the root."""


class LocalStorage:
    """A directory of a local or mounted file system."""

    lists = True

    def __init__(self, root: Path) -> None:
        self.root, self._prefix = root, f"{root}/"
        self._real = root.resolve()
        self._open = lru_cache(FILES_OPEN)(Handle)
        self._holds = lru_cache(FOLDERS_KEPT)(self.holds)

    def __reduce__(self) -> tuple[type[LocalStorage], tuple[Path]]:
        return LocalStorage, (self.root,)

    @property
    def scratch(self) -> Path:
        """Return a folder below the root, so that a finished file only needs renaming."""
        return self.root / SCRATCH / owner.current()

    def uri(self, name: str = "") -> str:
        """Return the path."""
        return self._prefix + name if name else str(self.root)

    def get(self, name: str) -> bytes | None:
        """Return the bytes of a file."""
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CorruptCacheError(
                f"{self.uri(name)} cannot be read: {error.strerror}."
            ) from error

    def get_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """Read one file after another."""
        return map(self.get, names)

    def get_with_age(self, name: str) -> tuple[bytes, float] | None:
        """Return the bytes of a file, and its age by its time of change."""
        data = self.get(name)
        return None if data is None else (data, owner.age(self.root / name))

    def exists(self, name: str) -> bool:
        """Return whether a path leads to something."""
        return (self.root / name).exists()

    def exist_many(self, names: Iterable[str]) -> Iterator[bool]:
        """Look for one path after another."""
        return map(self.exists, names)

    def list_dir(self, folder: str) -> list[str]:
        """Return the names of the files and folders in a folder."""
        try:
            return [entry.name for entry in os.scandir(self.root / folder)]
        except OSError:
            return []

    def list_prefix(self, folder: str) -> Iterator[str]:
        """Yield the names of all files below a folder."""
        top = str(self.root / folder)
        for at, _, names in os.walk(top):
            below = (folder + at[len(top) :]).lstrip("/")
            yield from (posixpath.join(below, name) for name in names)

    def hash(self, name: str) -> tuple[int, str]:
        """Hash a file in pieces."""
        path = self._inside(name)
        if path.is_symlink() or not path.is_file():
            raise CorruptCacheError(f"{path} is missing, or not a plain file.")
        return atomic.hash_file(path)

    def check_size(self, name: str, size: int) -> None:
        """Raise CorruptCacheError for a link, a missing file or one of another size."""
        path = self._inside(name)
        try:
            found = path.lstat().st_size
        except OSError as error:
            raise CorruptCacheError(f"{path} is missing: {error.strerror}.") from error
        if found != size:
            raise CorruptCacheError(f"{path} has {found:,} bytes, {size:,} were committed.")

    def holds(self, path: Path) -> bool:
        """Return whether a path, its links followed, lies within the directory."""
        if path == self.root:
            return True
        if path.is_symlink():
            return path.resolve().is_relative_to(self._real)
        return self._holds(path.parent)

    def get_ranges(self, wanted: Iterable[ByteRange]) -> Iterator[bytes]:
        """Read one range after another: a file system gains nothing from several at once."""
        for name, offset, length in wanted:
            yield self._open(self._prefix + name).read(offset, length)

    def put(self, name: str, data: bytes) -> None:
        """Write to a temporary file, flush and rename."""
        path = self._changed(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace(path, data)

    def put_if_absent(self, name: str, data: bytes, *, flush: bool = True) -> bool:
        """Write to a temporary file, flush and link, which fails where the name is taken."""
        path = self._changed(name)
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process removed the empty folder
                return atomic.create(path, data, flush=flush)

    def put_file(self, made: Path, name: str) -> None:
        """Flush and rename."""
        final = self._changed(name)
        atomic.sync(made)
        final.parent.mkdir(parents=True, exist_ok=True)
        made.replace(final)
        atomic.sync(final.parent)

    def delete(self, name: str) -> None:
        """Unlink a file, or a link, never what the link leads to."""
        self._changed(name).unlink(missing_ok=True)

    def delete_dir(self, folder: str) -> None:
        """Remove a folder."""
        shutil.rmtree(self._changed(folder), ignore_errors=True)

    def _inside(self, name: str) -> Path:
        """Return the path of an object. CorruptCacheError: it leads out of the cache."""
        path = self.root / name
        if not self.holds(path):
            raise CorruptCacheError(f"{path} leads out of the cache.")
        return path

    def _changed(self, name: str) -> Path:
        """Return the path of an object to be written or removed: its folder must lie inside."""
        path = self.root / name
        if not self._holds(path.parent):
            raise CorruptCacheError(
                f"{path} leads out of the cache and is left alone. Remove the link yourself."
            )
        return path

    def clean_up(self) -> None:
        """Remove scratch folders and temporary files whose owners are gone, and empty folders."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for name in self.list_dir(SCRATCH):
            if not owner.alive(name, owner.age(self.root / SCRATCH / name)):
                self.delete_dir(f"{SCRATCH}/{name}")
        atomic.sweep(self.root)
        for folder in (LEASES, SCRATCH):
            with contextlib.suppress(OSError):  # another process still uses it
                (self.root / folder).rmdir()

    def close(self) -> None:
        """Close the files that were kept open."""
        self._open.cache_clear()


class Handle:
    """An open file, closed with its last reference, so that no thread loses it while it reads."""

    __slots__ = ("number", "path")

    def __init__(self, path: str) -> None:
        self.path, self.number = path, -1
        try:
            self.number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise CorruptCacheError(f"{path} cannot be read: {error.strerror}.") from error

    def read(self, offset: int, length: int) -> bytes:
        """Return a range; CorruptCacheError where it is not all there."""
        try:
            data = os.pread(self.number, length, offset)
        except OSError as error:
            raise CorruptCacheError(f"{self.path} cannot be read: {error.strerror}.") from error
        if len(data) != length:
            raise CorruptCacheError(f"{self.path} is cut short: {len(data):,} of {length:,} bytes.")
        return data

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
