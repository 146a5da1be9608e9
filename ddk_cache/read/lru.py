"""The last values of a costly function, each made once however many threads ask for it.

`functools.lru_cache` lets two threads that miss at the same time both do the work, and asks for
one key at a time. Here a caller names all that it needs; what nobody has begun is made together,
so that the requests behind it can be joined, and what another thread has begun is waited for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from threading import Event, Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Slot(Generic[V]):
    """A value that is there, or that some thread is making."""

    __slots__ = ("error", "made", "value")

    value: V
    error: BaseException | None

    def __init__(self, made: Event) -> None:
        self.made, self.error = made, None

    def get(self) -> V:
        """Return the value, or raise what went wrong with it, once it is made."""
        if not self.made.is_set():
            self.made.wait()
        if self.error:
            raise self.error
        return self.value


class LRU(Generic[K, V]):
    """The `size` values used last of `make`: keys → a value for each, in order."""

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

    def _find(self, key: K, ours: dict[K, Slot[V]], made: Event) -> Slot[V]:
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
