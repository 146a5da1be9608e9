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
from pathlib import Path

import numpy as np

from ddk_cache import files
from ddk_cache.manifest import TOKENIZER
from ddk_cache.objects import Folder
from ddk_cache.reader import Cache
from ddk_cache.records import Object, object_path, record_path
from ddk_cache.schema import SPLITS, Array, CorruptCacheError, ShardKey, rows_at
from ddk_cache.shards import check_chunks
from ddk_cache.store import TOKEN_ARRAYS

THREADS = 8
"""Objects hashed at the same time; hashing and reading both let the interpreter go."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was committed."""

    path: Path
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
    """Return the bytes of all files below the domains of a cache."""
    files_below = (cache.root / "domains").rglob("*")
    return sum(path.stat().st_size for path in files_below if path.is_file())


def _tokenizer(cache: Cache) -> Iterator[Problem]:
    for name, entry in cache.manifest.root.tokenizer_files.items():
        yield from _differs(cache.root / TOKENIZER / name, *entry)


def _metadata(cache: Cache) -> Iterator[Problem]:
    documents = [cache.plan(domain).metadata for domain in cache.domains]
    for name, text in {n: t for metadata in documents for n, t in metadata.items()}.items():
        path = cache.root / name
        if not path.is_file() or path.read_bytes() != text.encode():
            yield Problem(path, f"{path} is missing or has changed")


def _shard(cache: Cache, key: ShardKey) -> tuple[list[Problem], int]:
    """Return the problems of a planned shard and the bytes that it has."""
    if not cache.is_committed(key):
        return list(_token_rows(cache, key)), 0
    try:
        record = cache.record(key)
    except CorruptCacheError as error:
        return [Problem(record_path(cache.root, key), str(error), key)], 0
    problems = []
    for name, entry in record.objects.items():
        problems += _object(cache, key, name, entry)
    return problems, sum(entry.bytes for entry in record.objects.values())


def _token_rows(cache: Cache, key: ShardKey) -> Iterator[Problem]:
    """Check the chunks of the token rows of a shard that no record vouches for yet."""
    for name in TOKEN_ARRAYS:
        path = object_path(cache.root, cache.spec, key, name)
        try:
            check_chunks(path, cache.spec.chunks_per_shard)
        except CorruptCacheError as error:
            yield Problem(path, str(error), key)


def _object(cache: Cache, key: ShardKey, name: str, entry: Object) -> list[Problem]:
    path = object_path(cache.root, cache.spec, key, name)
    if not Folder(cache.root).holds(path):
        return [Problem(path, f"{path} leads out of the cache", key)]
    return list(_differs(path, entry.bytes, entry.hash, key))


def _differs(path: Path, size: int, hashed: str, key: ShardKey | None = None) -> Iterator[Problem]:
    if path.is_symlink() or not path.is_file():
        yield Problem(path, f"{path} is missing, or not a plain file", key)
        return
    found = files.hash_file(path)
    if found[0] != size:
        yield Problem(path, f"{path} has {found[0]:,} bytes, {size:,} were committed", key)
    elif found[1] != hashed:
        yield Problem(path, f"{path} has changed: hash {found[1]}, committed {hashed}", key)


def drop_bad(cache: Cache, problems: list[Problem]) -> list[Path]:
    """Remove what is bad, so that `build` makes just that again; return what was removed.

    The record of a shard goes first: from then on the shard does not exist for any reader. The
    token rows of a shard are removed only if they are what is bad.
    """
    removed = []
    for problem in problems:
        if problem.key:
            removed.append(record_path(cache.root, problem.key))
        if (
            problem.path.name == "zarr.json"
            or problem.path.parent.name == TOKENIZER
            or (problem.key and any(name in problem.path.parts for name in TOKEN_ARRAYS))
        ):
            removed.append(problem.path)
    removed = list(dict.fromkeys(removed))
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


# --- the teacher on a sample ----------------------------------------------------------------------


Score = Callable[[ShardKey, Array, int], Mapping[str, Array]]
"""(what, (R, S+1) tokens, rows in a batch) → the teacher's scores, as `Scorer.score` gives them."""


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
    limit = cache.codec.error + 10 * float(noise.mean()) + 1e-4
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
