"""Threads for requests, made at the first use in each process.

Threads survive neither a fork nor a pickle, and an object that holds them should survive both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Pool:
    """At most `threads` threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield the results of all items in order; all are begun at once."""
        if self._pool is None or self._process != os.getpid():
            self._pool = ThreadPoolExecutor(self.threads, "request")
            self._process = os.getpid()
        return self._pool.map(work, items)

    def close(self) -> None:
        """End the threads."""
        if self._pool and self._process == os.getpid():
            self._pool.shutdown()
        self._pool = None

    def __reduce__(self) -> tuple[type[Pool], tuple[int]]:
        return Pool, (self.threads,)
