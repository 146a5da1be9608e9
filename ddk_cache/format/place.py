"""Whether a place holds a cache, nothing, or something else, which is never written over."""

from __future__ import annotations

from ddk_cache import atomic
from ddk_cache.errors import InputError, NotACacheError
from ddk_cache.format.layout import ROOT
from ddk_cache.format.manifest import Root
from ddk_cache.storage.base import Storage
from ddk_cache.storage.local import LocalStorage


def check_place(storage: Storage) -> None:
    """Raise InputError where the place holds something other than a cache."""
    if isinstance(storage, LocalStorage) and storage.root.is_file():
        raise not_ours(storage)
    names = storage.list_dir("")
    if ROOT in names:
        read_root(storage)
    elif not all(map(atomic.maker, names)):
        raise not_ours(storage)


def read_root(storage: Storage) -> Root:
    """Read the root of a cache. Raises InputError where the place holds something else."""
    try:
        return Root.parse(storage.get(ROOT) or b"", storage)
    except NotACacheError as error:
        raise not_ours(storage) from error


def not_ours(storage: Storage) -> InputError:
    """Return the error about a place that holds something else."""
    return InputError(f"{storage.uri()} exists and is not a cache. Give another path.")
