"""A path or a URL → the storage that it names."""

from __future__ import annotations

from pathlib import Path

from ddk_cache.storage.base import Storage
from ddk_cache.storage.local import LocalStorage
from ddk_cache.storage.url import scheme_of


def open_storage(place: str | Path) -> Storage:
    """Return the storage that a path or a URL names. InputError: the URL cannot be opened."""
    if not is_url(place):
        return LocalStorage(Path(place))
    url = str(place)
    match scheme_of(url):
        case "http" | "https":
            from ddk_cache.storage.http import HttpStorage

            return HttpStorage(url)
        case "hf":
            from ddk_cache.storage.hub import HubStorage

            return HubStorage(url)
        case _:
            from ddk_cache.storage.remote import RemoteStorage

            return RemoteStorage(url)


def is_url(place: str | Path) -> bool:
    """Return whether a cache is named by a URL and not by a path."""
    return "://" in str(place)
