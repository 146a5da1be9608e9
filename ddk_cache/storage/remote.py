"""An object store as storage, through `obstore`: s3://, gs://, az://, file:// and memory://.

A request costs tens of milliseconds, so requests made together overlap, and ranges of one object
that lie near each other are one request, at the price of the bytes between them. obstore retries
what fails, with growing pauses and up to a time limit; then one error is raised. An object is put
in one request, so that no half of an upload is left to pay for. Credentials and endpoints come
from the environment, as obstore documents them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …).
"""

from __future__ import annotations

import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from ddk_cache.errors import CorruptCacheError, InputError, StorageError
from ddk_cache.hashing import digest
from ddk_cache.storage.base import ByteRange
from ddk_cache.storage.pool import Pool
from ddk_cache.storage.url import CREDENTIALS, ON_THIS_MACHINE, check_url, scheme_of

T = TypeVar("T")

IN_FLIGHT = 32
"""Requests under way at the same time, at most."""

NEAR = 2**18
"""Bytes between two ranges of an object below which both are one request."""

PATIENCE = 60.0
"""Seconds after the first try of a request during which it is retried."""

PAUSE = 0.5
"""Seconds between two tries of a request that obstore does not retry."""

RUNTIME: dict[str, int] = {}
"""The process that made the first request, and thereby started obstore's threads."""


class RemoteStorage:
    """The objects below a URL."""

    lists = True

    def __init__(self, url: str, patience: float | None = None) -> None:
        """Open a URL. `patience` is in seconds; its default is DDK_PATIENCE, or else `PATIENCE`.

        Raises:
            InputError: the URL cannot be opened, holds credentials, or DDK_PATIENCE is not a
                number above 0.
        """
        check_url(url)
        self.url = url.rstrip("/")
        self.patience = patience or default_patience()
        try:
            import obstore
        except ImportError as error:
            raise InputError(
                f"{url} needs the package obstore: pip install 'ddk-distill[cloud]'."
            ) from error
        self._obstore = obstore
        self._store = self._open(obstore)
        self._pool = Pool(IN_FLIGHT)

    def __reduce__(self) -> tuple[type[RemoteStorage], tuple[str, float]]:
        return type(self), (self.url, self.patience)

    def _open(self, obstore: Any) -> Any:
        retry = {"max_retries": 10, "retry_timeout": timedelta(seconds=self.patience)}
        client: dict[str, Any] = {
            "timeout": timedelta(seconds=self.patience),
            "connect_timeout": "5 seconds",
        }
        remote = scheme_of(self.url) not in ON_THIS_MACHINE
        options: Any = {"retry_config": retry, "client_options": client | self._client()}
        try:
            return obstore.store.from_url(self._address, **options if remote else {})
        except (obstore.exceptions.BaseError, ValueError, OSError) as error:
            names = CREDENTIALS.get(scheme_of(self.url), "none")
            raise InputError(
                f"{self.url} cannot be opened: {first_line(error)}. Settings come from the "
                f"environment: {names}."
            ) from error

    @property
    def _address(self) -> str:
        """Return the URL that obstore is given."""
        return self.url

    def _client(self) -> dict[str, Any]:
        """Return further options of obstore's client."""
        endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
        return {"allow_http": endpoint.startswith("http:")}  # nobody sets such a one by chance

    @cached_property
    def scratch(self) -> Path:
        """Return a temporary folder; one left by a killed process is for the system to remove."""
        return Path(tempfile.mkdtemp(prefix="ddk-"))

    def uri(self, name: str = "") -> str:
        """Return the URL."""
        return f"{self.url}/{name}" if name else self.url

    def get(self, name: str) -> bytes | None:
        """Get an object."""
        found = self.get_with_age(name)
        return None if found is None else found[0]

    def get_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """Get objects, up to `IN_FLIGHT` at the same time."""
        return self._pool.map(self.get, names)

    def get_with_age(self, name: str) -> tuple[bytes, float] | None:
        """Get an object, and its age by the store's clock."""

        def ask() -> tuple[bytes, datetime]:
            answer = self._obstore.get(self._store, name)
            return bytes(answer.bytes()), answer.meta["last_modified"]

        try:
            data, written = self._ask(name, ask)
        except FileNotFoundError:
            return None
        return data, (datetime.now(UTC) - written).total_seconds()

    def exists(self, name: str) -> bool:
        """Ask for the size."""
        try:
            self._ask(name, lambda: self._obstore.head(self._store, name))
        except FileNotFoundError:
            return False
        return True

    def exist_many(self, names: Iterable[str]) -> Iterator[bool]:
        """Ask for the sizes of objects, up to `IN_FLIGHT` at the same time."""
        return self._pool.map(self.exists, names)

    def list_dir(self, folder: str) -> list[str]:
        """List, page by page."""

        def ask() -> list[str]:
            found = self._obstore.list_with_delimiter(self._store, folder)
            paths = [entry["path"] for entry in found["objects"]] + list(found["common_prefixes"])
            return [posixpath.basename(path.rstrip("/")) for path in paths]

        try:
            return self._ask(folder, ask)
        except FileNotFoundError:
            return []

    def list_prefix(self, folder: str) -> Iterator[str]:
        """List, page by page, of which one is in memory at a time."""
        pages = iter(self._obstore.list(self._store, folder))
        with suppress(FileNotFoundError):
            while page := self._ask(folder, lambda: next(pages, None)):
                yield from (entry["path"] for entry in page)

    def hash(self, name: str) -> tuple[int, str]:
        """Get an object and hash it."""
        data = self.get(name)
        if data is None:
            raise CorruptCacheError(f"{self.uri(name)} is missing.")
        return len(data), digest(data)

    def check_size(self, name: str, size: int) -> None:
        """Do nothing: a store has no links, and asking for a size costs as much as a range."""

    def get_ranges(self, wanted: Iterable[ByteRange]) -> Iterator[bytes]:
        """Get all ranges, those of one object together and all objects at the same time."""
        groups = [list(group) for _, group in groupby(wanted, key=lambda part: part.name)]
        for parts in self._pool.map(self._ranges, groups):
            yield from parts

    def _ranges(self, group: Sequence[ByteRange]) -> list[bytes]:
        name = group[0].name
        starts, lengths = [part.offset for part in group], [part.length for part in group]

        def ask() -> list[bytes]:
            found = self._obstore.get_ranges(
                self._store, name, starts=starts, lengths=lengths, coalesce=NEAR
            )
            return [bytes(part) for part in found]

        with suppress(FileNotFoundError):
            parts = self._ask(name, ask)
            if [len(part) for part in parts] == lengths:
                return parts
        raise CorruptCacheError(f"{self.uri(name)} is missing or cut short.")

    def put(self, name: str, data: bytes) -> None:
        """Put an object."""
        self._put(name, data, "overwrite")

    def put_if_absent(self, name: str, data: bytes, *, flush: bool = True) -> bool:
        """Put an object on the condition that there is none.

        obstore does not retry this after a lost answer, because it cannot know who created the
        object. Here the content decides: an equal object is ours, or as good as ours.
        """
        deadline = time.monotonic() + self.patience
        while True:
            try:
                self._put(name, data, "create")
            except FileExistsError:
                return self.get(name) == data
            except StorageError as error:
                refused = not isinstance(error.__cause__, self._obstore.exceptions.GenericError)
                if refused or time.monotonic() + PAUSE > deadline:
                    raise
                time.sleep(PAUSE)
            else:
                return True

    def _put(self, name: str, data: bytes, mode: str) -> None:
        def ask() -> None:
            self._obstore.put(self._store, name, data, mode=mode, use_multipart=False)

        try:
            self._ask(name, ask)
        except FileNotFoundError as error:
            raise InputError(
                f"{self.uri(name)} cannot be written: there is no such bucket. Create it first."
            ) from error

    def put_file(self, made: Path, name: str) -> None:
        """Put a file and remove it."""
        self.put(name, made.read_bytes())
        made.unlink()

    def delete(self, name: str) -> None:
        """Delete an object."""
        with suppress(FileNotFoundError):
            self._ask(name, lambda: self._obstore.delete(self._store, name))

    def delete_dir(self, folder: str) -> None:
        """Delete all objects below a prefix, many in a request."""
        if names := list(self.list_prefix(folder)):
            self._ask(folder, lambda: self._obstore.delete(self._store, names))

    def clean_up(self) -> None:
        """Remove the temporary folder; nothing half-written is ever on the store."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def close(self) -> None:
        """End the threads of requests."""
        self._pool.close()

    def _ask(self, name: str, request: Callable[[], T]) -> T:
        """Return the answer to a request.

        Raises:
            StorageError: no answer came, or it was a refusal.
            InputError: this process was forked from one that had made requests.
            FileNotFoundError: there is no such object.
            FileExistsError: the object was to be created and is there.
        """
        errors = self._obstore.exceptions
        if RUNTIME.setdefault("process", os.getpid()) != os.getpid():
            raise InputError(
                f"{self.uri()} cannot be read in a forked process: obstore's threads do not "
                "survive a fork. Start processes by 'spawn', for example "
                "DataLoader(multiprocessing_context='spawn')."
            )
        try:
            return request()
        except (errors.NotFoundError, FileNotFoundError) as error:
            raise FileNotFoundError(self.uri(name)) from error
        except (errors.AlreadyExistsError, FileExistsError) as error:
            raise FileExistsError(self.uri(name)) from error
        except (errors.BaseError, OSError) as error:
            raise StorageError(
                f"{self.uri(name)} cannot be reached (tried for up to {self.patience:.0f} s): "
                f"{self._reason(error)}. Committed work is safe; run the same command again to "
                "resume where it stopped."
            ) from error

    def _reason(self, error: BaseException) -> str:
        """Return what went wrong, and which variables to set where credentials may be missing."""
        errors, text = self._obstore.exceptions, first_line(error)
        names = CREDENTIALS.get(scheme_of(self.url))
        if names and METADATA_SERVICE in text:
            return f"no credentials were found. Set {names}"
        if names and isinstance(error, errors.UnauthenticatedError | errors.PermissionDeniedError):
            return f"{text}. Check the credentials in {names}"
        return text


METADATA_SERVICE = "169.254.169.254"
"""Where a virtual machine is asked for credentials when the environment has none."""


def default_patience() -> float:
    """Return the seconds in DDK_PATIENCE, or `PATIENCE`. Raises InputError where it is none."""
    text = os.environ.get("DDK_PATIENCE") or str(PATIENCE)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e6:
        raise InputError(f"DDK_PATIENCE: got {text!r}, expected seconds, a number above 0.")
    return seconds


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error; the others are its internals."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
