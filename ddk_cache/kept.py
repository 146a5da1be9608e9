"""The last values of a costly function, each made once however many threads ask for it.

`functools.lru_cache` lets two threads that miss at the same time both do the work, and asks for
one key at a time. Here a caller names all that it needs; what nobody has begun is made together,
so that the requests behind it can be joined, and what another thread has begun is waited for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """The `size` values used last of `make`: keys → a value for each, in order."""

    def __init__(self, size: int, make: Callable[[Sequence[K]], Iterable[V]]) -> None:
        self.size, self.make = size, make
        self._values: OrderedDict[K, Future[V]] = OrderedDict()
        self._lock = Lock()

    def __call__(self, keys: Sequence[K]) -> list[V]:
        """Return the value of each key; an error of `make` is raised and not kept."""
        ours: dict[K, Future[V]] = {}
        with self._lock:
            found = [self._find(key, ours) for key in keys]
            while len(self._values) > self.size:
                self._values.popitem(last=False)
        if ours:
            self._make(ours)
        return [value.result() for value in found]

    def _find(self, key: K, ours: dict[K, Future[V]]) -> Future[V]:
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = ours[key] = Future()
        else:
            self._values.move_to_end(key)
        return value

    def _make(self, ours: dict[K, Future[V]]) -> None:
        try:
            for value, made in zip(ours.values(), self.make(list(ours)), strict=True):
                value.set_result(made)
        except BaseException as error:
            with self._lock:
                for key, value in ours.items():
                    if not value.done():
                        self._values.pop(key, None)
                        value.set_exception(error)
            raise
