"""Pay for the teacher once: read and write caches of a teacher's sparse next-token targets.

This is the reading surface. It needs no torch; `open_cache` loads the decoder on first use, so
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
    UnfinishedCacheError,
)
from ddk_cache.format.plan import DomainPlan, Extent, rows_at
from ddk_cache.format.spec import FORMAT_VERSION, CacheSpec, TargetSpec
from ddk_cache.types import SPLITS, Rows, SparseTargets

if TYPE_CHECKING:
    from ddk_cache.read.cache import Cache, open_cache

__all__ = [
    "FORMAT_VERSION",
    "SPLITS",
    "Cache",
    "CacheError",
    "CacheSpec",
    "CorruptCacheError",
    "DDKError",
    "DomainPlan",
    "Extent",
    "FormatVersionError",
    "InputError",
    "MismatchError",
    "NotACacheError",
    "Rows",
    "SparseTargets",
    "TargetSpec",
    "UnfinishedCacheError",
    "open_cache",
    "rows_at",
]


def __getattr__(name: str) -> Any:
    if name in {"Cache", "open_cache"}:
        from ddk_cache.read import cache as reader

        return getattr(reader, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("ddk-distill")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
