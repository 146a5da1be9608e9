"""What a cache asks of the place where it lies: named bytes below one root.

Names are relative and use slashes. Storage are small and read whole, or large and read in
ranges; they appear whole or not at all. A writer makes a local file in `scratch` and hands it over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

LEASES, SCRATCH = "claims", "tmp"
"""Folders that are there only while somebody builds."""


class ByteRange(NamedTuple):
    """Bytes offset … offset + length − 1 of an object."""

    name: str
    offset: int
    length: int


class Storage(Protocol):
    """A place for objects. What goes wrong on the way to it is a named error."""

    @property
    def scratch(self) -> Path:
        """Return where this process makes its files; the directory may not be there yet."""

    def uri(self, name: str = "") -> str:
        """Return how a person finds an object, or the root."""

    def get(self, name: str) -> bytes | None:
        """Return a whole object; None where there is none. CorruptCacheError: it is unreadable."""

    def get_with_age(self, name: str) -> tuple[bytes, float] | None:
        """Return a whole object and the seconds since it was written; None where there is none."""

    def exists(self, name: str) -> bool:
        """Return whether there is such an object."""

    def list_dir(self, folder: str) -> list[str]:
        """Return the names of what lies directly in a folder, in no order; none of no folder."""

    def list_prefix(self, folder: str) -> Iterator[str]:
        """Yield the whole names of all objects below a folder, in no order."""

    def hash(self, name: str) -> tuple[int, str]:
        """Return size in bytes and xxh3-128 hash. CorruptCacheError: it is not there, or a link."""

    def check_size(self, name: str, size: int) -> None:
        """Raise CorruptCacheError unless an object is a plain one of `size` bytes, where the place
        can tell that without reading.
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
        """Remove the scratch of this process, and what those that died left beside objects."""
