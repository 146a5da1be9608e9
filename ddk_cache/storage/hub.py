"""A cache in a data set of the Hugging Face Hub, for reading: hf://datasets/ORG/NAME/mix.zarr.

Names are listed by the Hub's API through `huggingface_hub`; bytes come by `obstore` from the Hub's
file URLs, like those of any web server. A storage stays at the commit that it was opened at, so
that a run of days reads one cache, whatever is pushed meanwhile.
"""

from __future__ import annotations

import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from ddk_cache.errors import InputError, StorageError
from ddk_cache.storage.http import HttpStorage
from ddk_cache.storage.remote import first_line
from ddk_cache.storage.url import CREDENTIALS, redact

T = TypeVar("T")

HUB_URL = re.compile(
    r"hf://datasets/(\w[\w.-]*/\w[\w.-]*)(?:@([^/]+))?/(\w[\w.-]*(?:/\w[\w.-]*)*)", re.ASCII
)
"""Groups: data set, revision (a slash in it as %2F), folder of the cache."""

DATASET = "dataset"
"""The type of repository that holds caches."""


PAUSES = (1.0, 4.0)
"""Seconds before each further try of a request."""


class HubPlace(NamedTuple):
    """Where on the Hub a cache lies."""

    repo: str
    revision: str
    """Branch, tag or commit; a branch where something is written."""
    folder: str

    @classmethod
    def parse(cls, url: str) -> HubPlace:
        """Read a URL. Raises InputError on any but hf://datasets/ORG/NAME[@REVISION]/FOLDER."""
        found = HUB_URL.fullmatch(url.rstrip("/"))
        if not found:
            raise InputError(
                f"{redact(url)}: got another form of URL, expected "
                "hf://datasets/ORG/NAME[@REVISION]/mix.zarr."
            )
        return cls(found[1], unquote(found[2] or "main"), found[3])


def hub_api() -> Any:
    """Return the Hub's API at HF_ENDPOINT, with the token of HF_TOKEN or 'hf auth login'."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="ddk")


def ask_hub(url: str, request: Callable[[], T]) -> T:
    """Return what a request of `huggingface_hub` gives, tried again where that may help.

    It retries most requests by itself; those that it does not must be safe to repeat.

    Raises:
        InputError: there is no such data set or revision, or not for this token.
        FileNotFoundError: there is no such folder.
        StorageError: no answer came, or another refusal.
    """
    for pause in PAUSES:
        try:
            return _ask(url, request)
        except StorageError:
            time.sleep(pause)
    return _ask(url, request)


def _ask(url: str, request: Callable[[], T]) -> T:
    from httpx2 import HTTPError
    from huggingface_hub import errors

    try:
        return request()
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{url}: the data set has no such revision. Check the name.") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{url}: there is no such data set, or it is private. Check the name; set "
            f"{CREDENTIALS['hf']} for a private one."
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(url) from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # of an upload: RuntimeError
        text = f"{url} cannot be reached: {first_line(error)}."
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise InputError(f"{text} Check {CREDENTIALS['hf']}.") from error
        raise StorageError(
            f"{text} Committed work is safe; run the same command again to resume where it stopped."
        ) from error


class HubStorage(HttpStorage):
    """The files below a folder of a data set, at one commit."""

    lists = True
    otherwise = "Write a cache to a directory, and then 'ddk-cache push' it."

    def __init__(self, url: str, patience: float | None = None, commit: str = "") -> None:
        """Open a URL, at the commit that its revision names now or at the one given."""
        self.place, self.api = HubPlace.parse(url), hub_api()
        self.commit = commit
        if not commit:
            info = partial(self.api.dataset_info, self.place.repo, revision=self.place.revision)
            self.commit = ask_hub(url, info).sha
        super().__init__(url, patience)

    def __reduce__(self) -> Any:
        return HubStorage, (self.url, self.patience, self.commit)

    @property
    def _address(self) -> str:
        at = f"{self.place.repo}/resolve/{self.commit}/{quote(self.place.folder)}"
        return f"{self.api.endpoint}/datasets/{at}"

    def _client(self) -> dict[str, Any]:
        from huggingface_hub import get_token

        token = get_token()
        headers = {"default_headers": {"authorization": f"Bearer {token}"}} if token else {}
        return super()._client() | headers

    def _tree(self, folder: str, *, recursive: bool) -> list[Any]:
        """Return the entries of a folder; none where it is absent."""
        path = posixpath.join(self.place.folder, folder).rstrip("/")

        def ask() -> list[Any]:
            found = self.api.list_repo_tree(
                *(self.place.repo, path),
                recursive=recursive,
                revision=self.commit,
                repo_type=DATASET,
            )
            return list(found)

        try:
            return ask_hub(self.uri(folder), ask)
        except FileNotFoundError:
            return []

    def list_dir(self, folder: str) -> list[str]:
        """List a folder, page by page."""
        return [posixpath.basename(entry.path) for entry in self._tree(folder, recursive=False)]

    def list_prefix(self, folder: str) -> Iterator[str]:
        """List a folder and those below it, page by page."""
        from huggingface_hub.hf_api import RepoFile

        for entry in self._tree(folder, recursive=True):
            if isinstance(entry, RepoFile):
                yield posixpath.relpath(entry.path, self.place.folder)

    def exists(self, name: str) -> bool:
        """Look for a name in its folder."""
        return next(self.exist_many([name]))

    def exist_many(self, names: Iterable[str]) -> Iterator[bool]:
        """List each folder once: a file URL may lead elsewhere, where asking for a size fails."""
        listed: dict[str, set[str]] = {}
        for folder, name in map(posixpath.split, names):
            if folder not in listed:
                listed[folder] = set(self.list_dir(folder))
            yield name in listed[folder]
