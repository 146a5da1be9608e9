"""A batched, thread-safe LRU cache: each value is made once, however many threads ask for it.

`functools.lru_cache` lets two threads that miss at the same time both do the work, and takes one
key at a time. Here a caller names all the keys it needs; those that are missing are made together,
so that their requests can overlap, and those that another thread is making are waited for. The
price is one lock, held while keys are looked up and never while values are made.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from threading import Event, Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Slot(Generic[V]):
    """A value, made or being made by some thread."""

    __slots__ = ("error", "made", "value")

    value: V
    error: BaseException | None

    def __init__(self, made: Event) -> None:
        self.made, self.error = made, None

    def get(self) -> V:
        """Return the value once it is made, or raise the error of making it."""
        if not self.made.is_set():
            self.made.wait()
        if self.error:
            raise self.error
        return self.value


class LRU(Generic[K, V]):
    """The `size` most recently used values of `make`: keys → a value for each, in order."""

    def __init__(self, size: int, make: Callable[[Sequence[K]], Iterable[V]]) -> None:
        self.size, self.make = size, make
        self._slots: OrderedDict[K, Slot[V]] = OrderedDict()
        self._lock = Lock()

    def __call__(self, keys: Sequence[K]) -> list[V]:
        """Return the value of each key; an error of `make` is raised and not kept."""
        ours: dict[K, Slot[V]] = {}
        made = Event()
        with self._lock:
            found = [self._find(key, ours, made) for key in keys]
            while len(self._slots) > self.size:
                self._slots.popitem(last=False)
        if ours:
            self._make(ours, made)
        return [slot.get() for slot in found]

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._slots.clear()

    def _find(self, key: K, ours: dict[K, Slot[V]], made: Event) -> Slot[V]:
        """Return the slot of a key; a new one is also put into `ours`, for this thread to fill."""
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = ours[key] = Slot(made)
        else:
            self._slots.move_to_end(key)
        return slot

    def _make(self, ours: dict[K, Slot[V]], made: Event) -> None:
        try:
            for slot, value in zip(ours.values(), self.make(list(ours)), strict=True):
                slot.value = value
        except BaseException as error:
            with self._lock:
                for key, slot in ours.items():
                    slot.error = error
                    self._slots.pop(key, None)
            raise
        finally:
            made.set()
