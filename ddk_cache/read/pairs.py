"""The pairs of a cache for reading: a cache below it, in which two rows are a pair.

Row 2n holds the prompt and the teacher's response, row 2n + 1 the prompt and the student's; the
loss mask counts the response. `ddk_cache.sequences.pair` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ddk_cache.errors import InputError, UnfinishedCacheError
from ddk_cache.format.layout import ROOT, pairs_of
from ddk_cache.read.cache import Cache, open_cache
from ddk_cache.storage.open import open_storage


def open_pairs(
    cache: str | Path,
    *,
    unfinished: bool = False,
    shard_cache: str | Path = "",
    shard_cache_size: str = "50G",
) -> Cache:
    """Open the pairs of the cache at a path or URL; the options are those of `open_cache`.

    Raises:
        InputError: the cache has no pairs.
        UnfinishedCacheError: not every planned row is committed, unless `unfinished` is true.
        CacheError: as `open_cache`.
    """
    place = pairs_of(str(cache))
    if not has_pairs(cache):
        raise InputError(f"{cache} has no pairs of responses. Make them with 'ddk-cache pair'.")
    try:
        return open_cache(
            place,
            unfinished=unfinished,
            shard_cache=shard_cache,
            shard_cache_size=shard_cache_size,
        )
    except UnfinishedCacheError:
        raise UnfinishedCacheError(
            f"{place} is not finished. Run the same 'ddk-cache pair' again to resume where it "
            "stopped."
        ) from None


def has_pairs(cache: str | Path) -> bool:
    """Return whether pairs of a cache were begun."""
    return open_storage(pairs_of(str(cache))).exists(ROOT)


@contextmanager
def open_parts(cache: str | Path) -> Iterator[list[Cache]]:
    """Yield a cache and, where it has them, its pairs, finished or not, and close them again.

    Raises:
        CacheError: as `open_cache`.
    """
    with ExitStack() as stack:
        parts = [stack.enter_context(open_cache(cache, unfinished=True))]
        if has_pairs(cache):
            parts.append(stack.enter_context(open_pairs(cache, unfinished=True)))
        yield parts
