"""Audit of a cache: every committed object is there, with the size and hash of its record.

Reading everything once is the only honest check, so it is done in parallel and with progress.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ddk_cache import files
from ddk_cache.manifest import Record
from ddk_cache.reader import Cache
from ddk_cache.schema import SPLITS, CorruptCacheError, ShardKey

THREADS = 8
"""Objects hashed at the same time; hashing and reading both let the interpreter go."""


@dataclass
class Finding:
    """What verifying one split of one domain brought to light."""

    domain: str
    split: str
    shards: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify(cache: Cache, advance: Callable[[int], None]) -> list[Finding]:
    """Re-hash all committed objects; `advance` hears of bytes as they are done."""
    with ThreadPoolExecutor(THREADS) as pool:
        return [
            _verify_split(cache, domain, split, pool, advance)
            for domain in cache.domains
            for split in SPLITS
        ]


def _verify_split(
    cache: Cache, domain: str, split: str, pool: ThreadPoolExecutor, advance: Callable[[int], None]
) -> Finding:
    finding = Finding(domain, split)
    keys = [ShardKey(domain, split, index) for index in cache.committed(domain, split)]
    for record, problem in pool.map(lambda key: _check_record(cache, key), keys):
        finding.shards += 1
        if problem:
            finding.problems.append(problem)
        if record:
            checks = pool.map(lambda item: _check_object(cache, *item), record.objects.items())
            finding.problems += [problem for problem in checks if problem]
            size = sum(size for size, _ in record.objects.values())
            finding.bytes += size
            advance(size)
    return finding


def _check_record(cache: Cache, key: ShardKey) -> tuple[Record | None, str]:
    try:
        return cache.record(key), ""
    except CorruptCacheError as error:
        return None, str(error)


def _check_object(cache: Cache, name: str, committed: tuple[int, str]) -> str:
    path = cache.root / name
    if not path.is_file():
        return f"{path} is missing"
    size, found = files.hash_file(path)
    if size != committed[0]:
        return f"{path} has {size:,} bytes, {committed[0]:,} were committed"
    if found != committed[1]:
        return f"{path} has changed: its hash is {found}, {committed[1]} was committed"
    return ""
