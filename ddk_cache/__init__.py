"""Pay for the teacher once: write and read caches of a teacher's sparse next-token targets.

    with open_cache("mix.zarr") as cache:
        rows = cache["code"].train[:8]

What needs torch, or takes long to import, is loaded at first use, so that importing the package
(as every `--help` does) stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ddk_cache.build.config import BuildConfig
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
from ddk_cache.models.config import TeacherConfig
from ddk_cache.sequences.config import SamplingConfig
from ddk_cache.types import SPLITS, TRAIN, VALIDATION, Rows, SparseTargets

if TYPE_CHECKING:
    from ddk_cache.build.job import build_cache
    from ddk_cache.build.teacher import Teacher
    from ddk_cache.corpus.sources import Source, find_sources
    from ddk_cache.hf import load_tokenizer
    from ddk_cache.models.load import load_teacher
    from ddk_cache.read.cache import Cache, open_cache
    from ddk_cache.read.pairs import open_pairs
    from ddk_cache.read.split import Domain, Split
    from ddk_cache.sequences.decode import Responder, load_responder
    from ddk_cache.sequences.generate import generate
    from ddk_cache.sequences.pair import answer_prompts, build_pairs
    from ddk_cache.storage.shard_cache import parse_size
    from ddk_cache.transfer.copy import copy_cache
    from ddk_cache.transfer.imported import import_cache
    from ddk_cache.transfer.push import push_cache

__all__ = [
    "FORMAT_VERSION",
    "SPLITS",
    "TRAIN",
    "VALIDATION",
    "BuildConfig",
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
    "Responder",
    "RowRangeError",
    "Rows",
    "SamplingConfig",
    "Source",
    "SparseTargets",
    "Split",
    "StorageError",
    "TargetSpec",
    "Teacher",
    "TeacherConfig",
    "UnfinishedCacheError",
    "UnknownNameError",
    "answer_prompts",
    "build_cache",
    "build_pairs",
    "copy_cache",
    "find_sources",
    "generate",
    "import_cache",
    "load_responder",
    "load_teacher",
    "load_tokenizer",
    "open_cache",
    "open_pairs",
    "parse_size",
    "push_cache",
    "rows_at",
]

LAZY = {
    "Cache": "ddk_cache.read.cache",
    "Domain": "ddk_cache.read.split",
    "Responder": "ddk_cache.sequences.decode",
    "Source": "ddk_cache.corpus.sources",
    "Split": "ddk_cache.read.split",
    "Teacher": "ddk_cache.build.teacher",
    "answer_prompts": "ddk_cache.sequences.pair",
    "build_cache": "ddk_cache.build.job",
    "build_pairs": "ddk_cache.sequences.pair",
    "copy_cache": "ddk_cache.transfer.copy",
    "find_sources": "ddk_cache.corpus.sources",
    "generate": "ddk_cache.sequences.generate",
    "import_cache": "ddk_cache.transfer.imported",
    "load_responder": "ddk_cache.sequences.decode",
    "load_teacher": "ddk_cache.models.load",
    "load_tokenizer": "ddk_cache.hf",
    "open_cache": "ddk_cache.read.cache",
    "open_pairs": "ddk_cache.read.pairs",
    "parse_size": "ddk_cache.storage.shard_cache",
    "push_cache": "ddk_cache.transfer.push",
}
"""Name → the module that is imported when the name is first used."""


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("ddk-distill")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
