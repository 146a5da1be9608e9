"""What a cache asks of its directory or object store: named bytes below one root.

Names are relative and use slashes. Objects are small and read whole, or large and read in ranges;
they appear whole or not at all. A writer makes a local file in `scratch` and hands it over. A
storage can be pickled, for it is opened again by its path or URL.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

LEASES, SCRATCH = "claims", "tmp"
"""Folders that exist only while a build runs."""


class ByteRange(NamedTuple):
    """Bytes offset … offset + length − 1 of an object."""

    name: str
    offset: int
    length: int


class Storage(Protocol):
    """A directory, an object store or a web server. What fails on the way is a named error."""

    lists: bool
    """Whether it can say which objects it has; a static web server cannot."""

    @property
    def scratch(self) -> Path:
        """Return the directory for the temporary files of this process; it may not exist yet."""

    def uri(self, name: str = "") -> str:
        """Return the path or URL of an object, or of the root, for people."""

    def get(self, name: str) -> bytes | None:
        """Return a whole object; None where there is none. CorruptCacheError: it is unreadable."""

    def get_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """Yield what `get` returns for each name, in order; requests may overlap."""

    def get_with_age(self, name: str) -> tuple[bytes, float] | None:
        """Return a whole object and the seconds since it was written; None where there is none."""

    def exists(self, name: str) -> bool:
        """Return whether there is such an object."""

    def exist_many(self, names: Iterable[str]) -> Iterator[bool]:
        """Yield what `exists` returns for each name, in order; requests may overlap."""

    def list_dir(self, folder: str) -> list[str]:
        """Return the names directly in a folder, in no order; an absent folder is empty."""

    def list_prefix(self, folder: str) -> Iterator[str]:
        """Yield the whole names of all objects below a folder, in no order."""

    def hash(self, name: str) -> tuple[int, str]:
        """Return size in bytes and xxh3-128 hash. CorruptCacheError: it is missing, or a link."""

    def check_size(self, name: str, size: int) -> None:
        """Raise CorruptCacheError unless an object is a plain one of `size` bytes, where that can
        be told without reading it.
        """  # noqa: D205

    def get_ranges(self, wanted: Iterable[ByteRange]) -> Iterator[bytes]:
        """Yield ranges in the order asked for. CorruptCacheError: one is not all there."""

    def put(self, name: str, data: bytes) -> None:
        """Write an object, replacing what was there."""

    def put_if_absent(self, name: str, data: bytes, *, flush: bool = True) -> bool:
        """Write an object that is not there yet; False, changing nothing, where another is.

        Without `flush` it need not outlive a loss of power.
        """

    def put_file(self, made: Path, name: str) -> None:
        """Make a finished local file an object, replacing what was there; the file goes."""

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""

    def delete_dir(self, folder: str) -> None:
        """Remove all objects below a folder."""

    def clean_up(self) -> None:
        """Remove the scratch of this process, and temporary files whose processes have died."""

    def close(self) -> None:
        """Close files and connections. Using the storage again opens them again."""
