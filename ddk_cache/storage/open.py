"""A path or a URL → the storage that it names."""

from __future__ import annotations

from pathlib import Path

from ddk_cache.storage.base import Storage
from ddk_cache.storage.local import LocalStorage


def open_storage(place: str | Path) -> Storage:
    """Return the place that a path or a URL names. InputError: the URL cannot be opened."""
    if "://" in str(place):
        from ddk_cache.storage.remote import RemoteStorage

        return RemoteStorage(str(place))
    return LocalStorage(Path(place))
