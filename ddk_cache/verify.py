"""Audit of a cache on disk: every committed byte, every document, and the teacher on a sample.

Reading everything once is the only honest check of bytes, so it is done in parallel. What the
teacher says now is compared with what is stored beside a control, the teacher against itself in
another batch: on a GPU even that is not exact, and a difference means nothing without it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from ddk_cache.errors import CorruptCacheError
from ddk_cache.format.layout import TOKENIZER, object_name, record_name
from ddk_cache.format.plan import ShardKey, rows_at
from ddk_cache.format.spec import TOKEN_ARRAYS
from ddk_cache.format.zarr_shard import bodies
from ddk_cache.read.cache import Cache
from ddk_cache.storage.local import LocalStorage
from ddk_cache.types import SPLITS, Array

THREADS = 8
"""Storage hashed at the same time; hashing and reading both let the interpreter go."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was committed."""

    name: str
    """Of the object, below the root."""
    text: str
    key: ShardKey | None = None
    """The shard that it is part of, if it is part of one."""


def verify(cache: Cache, advance: Callable[[int], None]) -> list[Problem]:
    """Return every problem of a cache; `advance` hears of bytes as they are hashed."""
    problems = [*_tokenizer(cache), *_metadata(cache)]
    with ThreadPoolExecutor(THREADS) as pool:
        for found, size in pool.map(partial(_shard, cache), cache.manifest.shards()):
            problems += found
            advance(size)
    return problems


def bytes_below(cache: Cache) -> int:
    """Return the bytes of all files below the domains of a cache; 0 where counting costs much."""
    if not isinstance(cache.storage, LocalStorage):
        return 0
    files_below = (cache.root / "domains").rglob("*")
    return sum(path.stat().st_size for path in files_below if path.is_file())


def _tokenizer(cache: Cache) -> Iterator[Problem]:
    for name, entry in cache.manifest.root.tokenizer_files.items():
        yield from _differs(cache, f"{TOKENIZER}/{name}", *entry)


def _metadata(cache: Cache) -> Iterator[Problem]:
    documents = [cache.plan(domain).metadata for domain in cache.domains]
    for name, text in {n: t for metadata in documents for n, t in metadata.items()}.items():
        if cache.storage.get(name) != text.encode():
            yield Problem(name, f"{cache.storage.uri(name)} is missing or has changed")


def _shard(cache: Cache, key: ShardKey) -> tuple[list[Problem], int]:
    """Return the problems of a planned shard and the bytes that it has."""
    if not cache.is_committed(key):
        return list(_token_rows(cache, key)), 0
    try:
        record = cache.record(key)
    except CorruptCacheError as error:
        return [Problem(record_name(key), str(error), key)], 0
    problems: list[Problem] = []
    for array, entry in record.objects.items():
        name = object_name(cache.spec, key, array)
        problems += _differs(cache, name, entry.bytes, entry.hash, key)
    return problems, sum(entry.bytes for entry in record.objects.values())


def _token_rows(cache: Cache, key: ShardKey) -> Iterator[Problem]:
    """Check the chunks of the token rows of a shard that no record vouches for yet."""
    for array in TOKEN_ARRAYS:
        name = object_name(cache.spec, key, array)
        data, where = cache.storage.get(name), cache.storage.uri(name)
        if data is None:
            yield Problem(name, f"{where} is missing", key)
            continue
        try:
            list(bodies(data, where, cache.spec.chunks_per_shard))
        except CorruptCacheError as error:
            yield Problem(name, str(error), key)


def _differs(
    cache: Cache, name: str, size: int, hashed: str, key: ShardKey | None = None
) -> Iterator[Problem]:
    where = cache.storage.uri(name)
    try:
        found = cache.storage.hash(name)
    except CorruptCacheError as error:
        yield Problem(name, str(error), key)
        return
    if found[0] != size:
        yield Problem(name, f"{where} has {found[0]:,} bytes, {size:,} were committed", key)
    elif found[1] != hashed:
        yield Problem(name, f"{where} has changed: hash {found[1]}, committed {hashed}", key)


def drop_bad(cache: Cache, problems: list[Problem]) -> list[str]:
    """Remove what is bad, so that `build` makes just that again; return what was removed.

    The record of a shard goes first: from then on the shard does not exist for any reader. The
    token rows of a shard are removed only if they are what is bad.
    """
    removed = []
    for problem in problems:
        if problem.key:
            removed.append(record_name(problem.key))
        parts = problem.name.split("/")
        if (
            parts[-1] == "zarr.json"
            or parts[0] == TOKENIZER
            or (problem.key and any(array in parts for array in TOKEN_ARRAYS))
        ):
            removed.append(problem.name)
    removed = list(dict.fromkeys(removed))
    for name in removed:
        cache.storage.delete(name)
    return [cache.storage.uri(name) for name in removed]


# --- the teacher on a sample ----------------------------------------------------------------------


Score = Callable[[ShardKey, Array, int], Mapping[str, Array]]
"""(what, (R, S+1) tokens, rows in a batch) → the arrays that `Scorer.score` gives."""


@dataclass(frozen=True)
class Replay:
    """Differences of log-probabilities on N rows, in nats, beside what they may be."""

    rows: int
    stored_mean: float
    stored_max: float
    """Of the stored values to the teacher's now."""
    control_mean: float
    control_max: float
    """Of the teacher to itself, a row at a time."""
    limit: float
    """The largest mean difference of a row that rounding and the control explain."""
    bad: tuple[str, ...]
    """Rows beyond it."""


def replay(cache: Cache, score: Score, count: int, seed: int) -> Replay:
    """Run the teacher on random committed rows again and compare."""
    stored, control = [], []
    names = sample_rows(cache, count, seed)
    for domain, split in dict.fromkeys((domain, split) for domain, split, _ in names):
        numbers = [row for d, s, row in names if (d, s) == (domain, split)]
        rows, key = cache.read(domain, split, numbers), ShardKey(domain, split, 0)
        now = score(key, rows.tokens, cache.manifest.root.batch_rows)
        again = score(key, rows.tokens, 1)
        stored.append(_difference(rows.label_logprob, now["label_logprob"]))
        control.append(_difference(again["label_logprob"], now["label_logprob"]))
    off, noise = np.concatenate(stored), np.concatenate(control)
    limit = cache.logprob.error + 10 * float(noise.mean()) + 1e-4
    bad = [name for name, row in zip(names, off.mean(1), strict=True) if row > limit]
    return Replay(
        rows=len(names),
        stored_mean=float(off.mean()),
        stored_max=float(off.max()),
        control_mean=float(noise.mean()),
        control_max=float(noise.max()),
        limit=limit,
        bad=tuple(f"{domain}/{split} row {row}" for domain, split, row in bad),
    )


def _difference(one: Array, other: Array) -> Array:
    return np.abs(one.astype(np.float64) - other.astype(np.float64))


def sample_rows(cache: Cache, count: int, seed: int) -> list[tuple[str, str, int]]:
    """Return (domain, split, row) of random committed rows, in the order of the cache."""
    pairs = [(domain, split) for domain in cache.domains for split in SPLITS]
    ends = np.cumsum([cache.committed_rows(*pair) for pair in pairs])
    total = int(ends[-1])
    chosen = np.array(sorted(random.Random(seed).sample(range(total), min(count, total))))
    rows = []
    for pair, first, end in zip(pairs, [0, *ends], ends, strict=False):
        places = chosen[(first <= chosen) & (chosen < end)] - first
        found = rows_at(cache.committed_extents(*pair), places)
        rows += [(*pair, row) for row in found.tolist()]
    return rows
