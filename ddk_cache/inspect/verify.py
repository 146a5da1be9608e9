"""Verification of a cache on disk: every committed byte, every document, the teacher on a sample.

Reading everything once is the only honest check of bytes, so it is done in parallel. A teacher is
compared with what is stored next to a control, the teacher with itself in another batch: on a GPU
even that is not exact, and a difference means nothing without it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from ddk_cache.errors import (
    CacheError,
    CorruptCacheError,
    InputError,
    MismatchError,
    UnfinishedCacheError,
)
from ddk_cache.format.layout import ROOT, TOKENIZER, object_name, record_name, tokenizer_name
from ddk_cache.format.plan import ShardKey, rows_at
from ddk_cache.format.spec import TOKEN_ARRAYS
from ddk_cache.format.zarr_shard import bodies
from ddk_cache.read.cache import Cache
from ddk_cache.types import SPLITS, Array

if TYPE_CHECKING:
    from ddk_cache.build.teacher import Teacher

THREADS = 8
"""Files hashed at the same time; hashing and reading both release the GIL."""

AT_ONCE = 1024
"""Shards that the threads are given together: a list of results is no longer than that."""

T = TypeVar("T")


class Part(NamedTuple):
    """A part of a cache: 3/16 has the shards 3, 19, 35, … of all, counted from 1."""

    number: int
    """From 1 to `of`. The first part has the tokenizer and the Zarr documents too."""
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return the part that a text such as "3/16" names. Raises InputError."""
        number, slash, of = text.partition("/")
        if slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
            return cls(int(number), int(of))
        raise InputError(f"--part: got {text!r}, expected a part such as 3/16, from 1/16 to 16/16.")


WHOLE = Part(1, 1)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was committed."""

    name: str
    """Name of the object, below the root."""
    text: str
    key: ShardKey | None = None
    """The shard that it is part of, if it is part of one."""


def verify(cache: Cache, advance: Callable[[int], None], part: Part = WHOLE) -> list[Problem]:
    """Return every problem of a cache, or of a part of it.

    `advance` is called with the bytes hashed of each shard.
    """
    problems = [*_tokenizer(cache), *_metadata(cache)] if part.number == 1 else []
    for found, size in _each(partial(_shard, cache), shards_of(cache, part)):
        problems += found
        advance(size)
    return problems


def bytes_to_hash(cache: Cache, part: Part = WHOLE) -> int:
    """Return the sum of what `verify` passes to `advance`, from the records alone."""
    keys = [key for key in shards_of(cache, part) if cache.is_committed(key)]
    return sum(_each(partial(_size, cache), keys))


def shards_of(cache: Cache, part: Part) -> list[ShardKey]:
    """Return the planned shards of a part of a cache."""
    keys = cache.manifest.each_shard(cache.domains)
    return list(islice(keys, part.number - 1, None, part.of))


def _each(work: Callable[[ShardKey], T], keys: Sequence[ShardKey]) -> Iterator[T]:
    """Yield the results for shards in order, worked at by several threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(keys), AT_ONCE):
            yield from pool.map(work, keys[first : first + AT_ONCE])


def _size(cache: Cache, key: ShardKey) -> int:
    try:
        return sum(entry.bytes for entry in cache.record(key).objects.values())
    except CorruptCacheError:  # its files are not hashed
        return 0


def _tokenizer(cache: Cache) -> Iterator[Problem]:
    """Check the tokenizer's files, and that there are no others."""
    files = cache.manifest.root.tokenizer_files
    for file, entry in files.items():
        yield from _differs(cache, tokenizer_name(file), *entry)
    there = cache.storage.list_prefix(TOKENIZER) if cache.storage.lists else ()
    for name in set(there) - set(map(tokenizer_name, files)):
        yield Problem(name, f"{cache.storage.uri(name)} is not part of the cache")


def _metadata(cache: Cache) -> Iterator[Problem]:
    documents = {n: t for name in cache.domains for n, t in cache.plan(name).metadata.items()}
    for (name, text), found in zip(
        documents.items(), cache.storage.get_many(documents), strict=True
    ):
        if found != text.encode():
            yield Problem(name, f"{cache.storage.uri(name)} is missing or has changed")


def _shard(cache: Cache, key: ShardKey) -> tuple[list[Problem], int]:
    """Return the problems of a planned shard and the bytes that were hashed."""
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
    """Check the chunks of the token rows of a shard that has no record yet."""
    for array in cache.spec.token_arrays:
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


def drop_bad(cache: Cache, problems: Sequence[Problem]) -> list[str]:
    """Remove what is bad, so that `build` makes just that again; return what was removed.

    The record of a shard goes first: from then on the shard does not exist for any reader. The
    token rows of a shard are removed only if they are what is bad.

    Raises:
        CorruptCacheError: something lies outside of the cache, behind a link. It is left alone;
            everything else was removed.
    """
    removed, outside = [], []
    for name in dict.fromkeys(name for problem in problems for name in _bad(problem)):
        try:
            cache.storage.delete(name)
        except CorruptCacheError as error:
            outside.append(str(error))
        else:
            removed.append(cache.storage.uri(name))
    if outside:
        raise CorruptCacheError("\n".join(outside))
    return removed


def _bad(problem: Problem) -> Iterator[str]:
    """Yield the objects to be removed for a problem, in order."""
    parts = problem.name.split("/")
    if problem.key:
        yield record_name(problem.key)
    is_tokens = problem.key is not None and any(array in parts for array in TOKEN_ARRAYS)
    if is_tokens or parts[-1] == ROOT or parts[0] == TOKENIZER:
        yield problem.name


# --- the teacher on a sample ----------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """Differences of log-probabilities on N rows, in nats, and how large they may be."""

    rows: int
    domains: list[str]
    """The domains of this teacher."""
    stored_mean: float
    stored_max: float
    """Stored values compared with the teacher's now."""
    control_mean: float
    control_max: float
    """The teacher compared with itself, a row at a time."""
    limit: float
    """The largest mean difference of a row that rounding and the control explain."""
    bad: tuple[str, ...]
    """Rows beyond it."""


def replay(cache: Cache, teacher: Teacher, count: int, seed: int) -> Replay:
    """Run a teacher of a cache on random committed rows of its domains again and compare.

    Raises:
        MismatchError: no domain was built with this teacher.
        InputError: the teacher does not keep the documents of a row apart, and the cache does.
        UnfinishedCacheError: no row is committed yet.
    """
    from ddk_cache.build.scoring import Scorer

    domains = _domains_of(cache, teacher)
    if cache.spec.packing == "documents":
        teacher.require_isolation()
    batches = [Scorer(teacher, cache.spec, rows) for rows in (cache.manifest.root.batch_rows, 1)]
    stored, control = [], []
    names = sample_rows(cache, domains, count, seed)
    for domain, split in dict.fromkeys((domain, split) for domain, split, _ in names):
        numbers = [row for d, s, row in names if (d, s) == (domain, split)]
        rows, key = cache.read(domain, split, numbers), ShardKey(domain, split, 0)
        now, again = (
            scorer.score(key, rows.tokens, lambda _: None, rows.segments).arrays["label_logprob"]
            for scorer in batches
        )
        stored.append(_difference(rows.label_logprob, now))
        control.append(_difference(again, now))
    off, noise = np.concatenate(stored), np.concatenate(control)
    limit = cache.logprob.error + 10 * float(noise.mean()) + 1e-4
    bad = [name for name, row in zip(names, off.mean(1), strict=True) if row > limit]
    return Replay(
        rows=len(names),
        domains=domains,
        stored_mean=float(off.mean()),
        stored_max=float(off.max()),
        control_mean=float(noise.mean()),
        control_max=float(noise.max()),
        limit=limit,
        bad=tuple(f"{domain}/{split} row {row}" for domain, split, row in bad),
    )


def _domains_of(cache: Cache, teacher: Teacher) -> list[str]:
    """Return the domains of a teacher. Raises MismatchError where it has none."""
    identities = {name: dict(cache.manifest.spec_of(name).teacher) for name in cache.domains}
    found = [name for name, identity in identities.items() if identity == dict(teacher.identity)]
    if found or not identities:
        return found
    was, now = cache.spec.teacher, teacher.identity
    differences = [
        f"{name}: the cache has {was.get(name)}, this teacher has {now.get(name)}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]
    if others := cache.manifest.teachers:
        differences.append(f"{', '.join(others)}: of other teachers, and neither of this one")
    raise MismatchError(
        f"{cache.uri} was built with another teacher than {teacher.name}:\n  "
        + "\n  ".join(differences)
    )


def _difference(one: Array, other: Array) -> Array:
    return np.abs(one.astype(np.float64) - other.astype(np.float64))


def sample_rows(
    cache: Cache, domains: Sequence[str], count: int, seed: int
) -> list[tuple[str, str, int]]:
    """Return (domain, split, row) of random committed rows of some domains, in order.

    Raises:
        UnfinishedCacheError: there is none.
    """
    pairs = [(domain, split) for domain in domains for split in SPLITS]
    ends = np.cumsum([0, *(cache.committed_rows(*pair) for pair in pairs)])
    total = int(ends[-1])
    if not total:
        raise UnfinishedCacheError(f"{cache.uri} has no committed row to compare a teacher with.")
    chosen = np.array(sorted(random.Random(seed).sample(range(total), min(count, total))))
    rows = []
    for pair, first, end in zip(pairs, ends, ends[1:], strict=False):
        places = chosen[(first <= chosen) & (chosen < end)] - first
        found = rows_at(cache.committed_extents(*pair), places)
        rows += [(*pair, row) for row in found.tolist()]
    return rows


def require_sound(cache: Cache, problems: Sequence[Problem], found: Replay | None) -> None:
    """Raise CacheError where verifying found something."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise CacheError(f"{count} in {cache.uri}; --drop-bad removes what is bad.")
    if found and found.bad:
        raise CacheError(
            f"{cache.uri}: the stored targets differ from this teacher in {len(found.bad)} of "
            f"{found.rows} rows."
        )
