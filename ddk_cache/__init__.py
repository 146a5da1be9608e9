"""Pay for the teacher once: read and write caches of a teacher's sparse next-token targets.

    with open_cache("mix.zarr") as cache:
        rows = cache["code"].train[:8]

This is the reading surface. It needs no torch; `open_cache` loads the decoder at first use, so
that importing the package (as every `--help` does) stays cheap.
"""

from typing import TYPE_CHECKING, Any

from ddk_cache.errors import (
    CacheError,
    CorruptCacheError,
    DDKError,
    FormatVersionError,
    InputError,
    MismatchError,
    NotACacheError,
    RowRangeError,
    StorageError,
    UnfinishedCacheError,
    UnknownNameError,
)
from ddk_cache.format.plan import DomainPlan, Extent, rows_at
from ddk_cache.format.spec import FORMAT_VERSION, CacheSpec, TargetSpec
from ddk_cache.types import SPLITS, TRAIN, VALIDATION, Rows, SparseTargets

if TYPE_CHECKING:
    from ddk_cache.read.cache import Cache, open_cache
    from ddk_cache.read.split import Domain, Split

__all__ = [
    "FORMAT_VERSION",
    "SPLITS",
    "TRAIN",
    "VALIDATION",
    "Cache",
    "CacheError",
    "CacheSpec",
    "CorruptCacheError",
    "DDKError",
    "Domain",
    "DomainPlan",
    "Extent",
    "FormatVersionError",
    "InputError",
    "MismatchError",
    "NotACacheError",
    "RowRangeError",
    "Rows",
    "SparseTargets",
    "Split",
    "StorageError",
    "TargetSpec",
    "UnfinishedCacheError",
    "UnknownNameError",
    "open_cache",
    "rows_at",
]

LATER = {"Cache": "cache", "open_cache": "cache", "Domain": "split", "Split": "split"}
"""Name → the module of `ddk_cache.read` that defines it, imported at first use."""


def __getattr__(name: str) -> Any:
    if name in LATER:
        from importlib import import_module

        return getattr(import_module(f"ddk_cache.read.{LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
