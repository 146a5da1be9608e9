"""A path or a URL → the storage that it names."""

from __future__ import annotations

from pathlib import Path

from ddk_cache.storage.base import Storage
from ddk_cache.storage.local import LocalStorage


def open_storage(place: str | Path) -> Storage:
    """Return the storage that a path or a URL names. InputError: the URL cannot be opened."""
    if is_url(place):
        from ddk_cache.storage.remote import RemoteStorage

        return RemoteStorage(str(place))
    return LocalStorage(Path(place))


def is_url(place: str | Path) -> bool:
    """Return whether a cache is named by a URL and not by a path."""
    return "://" in str(place)
