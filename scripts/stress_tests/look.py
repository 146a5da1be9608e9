"""Looking at a cache that may be damaged, in a process of its own with little memory and time."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from ddk_cache.errors import DDKError
from ddk_cache.hashing import digest
from ddk_cache.inspect.describe import describe
from ddk_cache.inspect.verify import verify
from ddk_cache.read.cache import Cache, open_cache
from ddk_cache.types import SPLITS

MEMORY = 4 * 2**30
"""Bytes of address space of a process that reads a damaged cache."""

TIME = 10
"""Seconds for looking at a damaged cache."""

GROWTH = 200 * 2**20
"""Bytes by which it may grow."""

Pair = tuple[str, str]


class StuckError(BaseException):
    """Something took too long; no handler of ordinary errors may swallow it."""


@dataclass
class Look:
    """The results of the library for a cache."""

    said: list[tuple[str, str, str]] = field(default_factory=list)
    """Stage, class of the error, message."""
    wrong: list[str] = field(default_factory=list)
    """Rows that were given and are not the right ones."""
    other: list[str] = field(default_factory=list)
    """Exceptions that are no DDKError."""

    def attempt(self, stage: str, step: Callable[[], Any]) -> Any:
        """Return the result of a step; None if it fails."""
        try:
            return step()
        except DDKError as error:
            self.said.append((stage, type(error).__name__, str(error)))
        except Exception as error:
            self.other.append(f"{stage}: {type(error).__name__}: {str(error)[:200]}")
        return None

    def found(self, *stages: str) -> bool:
        """Return whether one of these stages said anything."""
        return any(stage in stages for stage, _, _ in self.said)


def look(root: Path, truth: Mapping[Pair, str]) -> Look:
    """Open, describe, verify and read a cache; whatever happens, in good time."""
    seen = Look()
    signal.signal(signal.SIGALRM, stuck)
    signal.alarm(TIME)
    try:
        look_into(seen, root, truth)
    except StuckError:
        seen.other.append(f"it took more than {TIME} s")
    finally:
        signal.alarm(0)
    return seen


def look_into(seen: Look, root: Path, truth: Mapping[Pair, str]) -> None:
    """Note what each stage says."""
    cache = seen.attempt("open", lambda: open_cache(root, unfinished=True))
    if cache is None:
        return
    seen.attempt("info", lambda: describe(cache))
    for problem in seen.attempt("verify", lambda: verify(cache, lambda _: None)) or []:
        seen.said.append(("verify", "Problem", problem.text))
    for pair, right in truth.items():
        rows = seen.attempt("read", partial(rows_hash, cache, *pair))
        if rows not in (None, right):
            seen.wrong.append("/".join(pair))


def rows_hash(cache: Cache, domain: str, split: str) -> str:
    """Read all rows of a split; return a hash of their values."""
    rows = cache.read(domain, split, cache.row_numbers(domain, split))
    parts = (rows.tokens, rows.label_logprob, rows.loss_mask, *vars(rows.targets).values())
    return digest(b"".join(part.tobytes() for part in parts))


def truth_of(root: Path) -> dict[Pair, str]:
    """Return the hash of the rows of each split."""
    cache = open_cache(root)
    return {(d, s): rows_hash(cache, d, s) for d in cache.domains for s in SPLITS}


def kind_of(path: Path, root: Path) -> str:
    """Return what a file of a cache is."""
    first, *rest = path.relative_to(root).parts
    if first == "domains":
        return "Zarr document" if path.name == "zarr.json" else "shard object"
    known = {"commits": "record", "plans": "plan", "tokenizer": "tokenizer file"}
    return known[first] if rest else "root"


def files_of(root: Path) -> list[Path]:
    """Return every file of a cache, in order."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """Call a function in a fresh process of limited memory; None if it dies of it."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context, initializer=limit) as pool:
        try:
            return pool.submit(function, *given).result()
        except BrokenProcessPool:
            return None


def limit() -> None:
    """Limit the address space of this process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def stuck(number: int, frame: FrameType | None) -> None:
    """Stop what takes too long."""
    raise StuckError
