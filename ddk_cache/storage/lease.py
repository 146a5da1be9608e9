"""Which process works on what: an object for each claim, and no lock that survives a crash.

A claim is an object that only one process can create; its content names the owner, and writing it
again is the sign of life. One whose owner is gone is taken over. That two processes then do the
same work for a moment is possible and harmless, because what they make is a function of the plan
and appears whole; so there is no need for anything stronger, and no scheduler. How old a claim
is, the place that keeps it says: the clocks of two workers need not agree, only each with the
place's, to well within the lease.
"""

from __future__ import annotations

import time
from threading import Lock

from ddk_cache import owner
from ddk_cache.storage.base import LEASES, Storage

BEAT = 15.0
"""Seconds between two signs of life, at least: eight in a lease, and few requests to a store."""


class Leases:
    """The claims of one process on the work of one cache."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._owner = owner.current().encode()
        self._held: set[str] = set()
        self._lock = Lock()  # a sign of life must not bring back what another thread gives back
        self._beaten = 0.0

    def take(self, name: str) -> bool:
        """Claim a piece of work; False where this or another live process has it."""
        if name in self._held:
            return False
        while not self.storage.put_if_absent(f"{LEASES}/{name}", self._owner, flush=False):
            if self._fresh(name):
                return False
            self.storage.delete(f"{LEASES}/{name}")
        self._held.add(name)
        return True

    def release(self, name: str) -> None:
        """Give a claim back."""
        with self._lock:
            self._held.discard(name)
            self.storage.delete(f"{LEASES}/{name}")

    def release_all(self) -> None:
        """Give all claims back, and those of the dead with them."""
        for name in self.storage.list_dir(LEASES):
            if name in self._held or not self._fresh(name):
                self.release(name)

    def others(self) -> bool:
        """Return whether another live process holds a lease."""
        names = self.storage.list_dir(LEASES)
        return any(name not in self._held and self._fresh(name) for name in names)

    def beat(self) -> None:
        """Give a sign of life, if the last one is a while ago."""
        if time.monotonic() - self._beaten < BEAT:
            return
        self._beaten = time.monotonic()
        with self._lock:
            for name in list(self._held):
                if self.storage.get(f"{LEASES}/{name}") == self._owner:
                    self.storage.put(f"{LEASES}/{name}", self._owner)
                else:  # taken over; what we make is the same
                    self._held.discard(name)

    def _fresh(self, name: str) -> bool:
        """Return whether the owner of a claim is alive."""
        found = self.storage.get_with_age(f"{LEASES}/{name}")
        return found is not None and owner.alive(found[0].decode(errors="replace"), found[1])
