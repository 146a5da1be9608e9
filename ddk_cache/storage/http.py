"""A static web server as storage, through `obstore`, for reading: https:// and http://.

Such a server gives the object of a name and lists nothing. All names of a cache follow from its
root and its plans, so nothing needs to be listed: whether a shard is committed is asked of its
record. The price is one request per shard when a cache is opened. Requests overlap and are retried
as in `ddk_cache.storage.remote`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ddk_cache.errors import InputError, StorageError
from ddk_cache.storage.base import ByteRange
from ddk_cache.storage.remote import RemoteStorage


class HttpStorage(RemoteStorage):
    """The objects below a URL of a web server. Whatever would change them is an InputError."""

    lists = False
    otherwise = "Give a directory or an object store to write to."
    """What to do where something was to be written."""

    def _client(self) -> dict[str, Any]:
        return {"allow_http": self._address.startswith("http:")}

    def _ranges(self, group: Sequence[ByteRange]) -> list[bytes]:
        try:
            return super()._ranges(group)
        except StorageError as error:
            if not isinstance(error.__cause__, self._obstore.exceptions.NotSupportedError):
                raise
            raise StorageError(
                f"{self.uri(group[0].name)}: got the whole object from the server, expected the "
                "range that was asked for. Use a server with range requests, keep whole shards "
                "with --shard-cache, or copy the cache with 'ddk-cache copy'."
            ) from error

    def list_dir(self, folder: str) -> list[str]:
        """Raise InputError."""
        self._refuse()

    def list_prefix(self, folder: str) -> Iterator[str]:
        """Raise InputError."""
        self._refuse()

    def put(self, name: str, data: bytes) -> None:
        """Raise InputError."""
        self._refuse()

    def put_if_absent(self, name: str, data: bytes, *, flush: bool = True) -> bool:
        """Raise InputError."""
        self._refuse()

    def put_file(self, made: Path, name: str) -> None:
        """Raise InputError."""
        self._refuse()

    def delete(self, name: str) -> None:
        """Raise InputError."""
        self._refuse()

    def delete_dir(self, folder: str) -> None:
        """Raise InputError."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise InputError(f"{self.uri()} is read-only here. {self.otherwise}")
