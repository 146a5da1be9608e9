"""Which process works on what: one object per lease, and no lock that survives a crash.

A lease is an object that only one process can create. Its content names the owner, who writes it
again to renew it; a lease whose owner is gone is taken over. Two processes may then do the same
work for a moment, which is harmless: what they make is a function of the plan and appears whole.
So nothing stronger is needed, and no scheduler. The age of a lease is what the storage says, or
how long this process has seen it unchanged, whichever is more: a clock that runs ahead on another
machine delays a takeover by one lease time and no longer.
"""

from __future__ import annotations

import logging
import time
from threading import Lock

from ddk_cache import owner
from ddk_cache.storage.base import LEASES, Storage

BEAT = 15.0
"""Seconds between two renewals, at least: eight in a lease time, and few requests to a store."""

log = logging.getLogger(__name__)


class Leases:
    """The leases of one process on the work of one cache."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._owner = owner.current().encode()
        self._held: set[str] = set()
        self._lock = Lock()  # a renewal must not bring back what another thread releases
        self._renewed = 0.0
        self._seen: dict[str, tuple[bytes, float, float]] = {}
        """Lease → its content, when it was written, and since when it has not changed."""
        self._reported: set[bytes] = set()

    def take(self, name: str) -> bool:
        """Lease a piece of work; False where this or another live process has it."""
        if name in self._held:
            return False
        while not self.storage.put_if_absent(f"{LEASES}/{name}", self._owner, flush=False):
            if self._fresh(name):
                return False
            self.storage.delete(f"{LEASES}/{name}")
        self._held.add(name)
        return True

    def release(self, name: str) -> None:
        """Give a lease back."""
        with self._lock:
            self._held.discard(name)
            self.storage.delete(f"{LEASES}/{name}")

    def release_all(self) -> None:
        """Give all leases back, and remove those of dead processes."""
        for name in self.storage.list_dir(LEASES):
            if name in self._held or not self._fresh(name):
                self.release(name)

    def others(self) -> bool:
        """Return whether another live process holds a lease."""
        names = self.storage.list_dir(LEASES)
        return any(name not in self._held and self._fresh(name) for name in names)

    def beat(self) -> None:
        """Renew all leases, if the last renewal is `BEAT` seconds ago."""
        if time.monotonic() - self._renewed < BEAT:
            return
        self._renewed = time.monotonic()
        with self._lock:
            for name in list(self._held):
                if self.storage.get(f"{LEASES}/{name}") == self._owner:
                    self.storage.put(f"{LEASES}/{name}", self._owner)
                else:  # taken over; both make the same bytes
                    self._held.discard(name)

    def _fresh(self, name: str) -> bool:
        """Return whether the owner of a lease is alive, as far as can be told."""
        found = self.storage.get_with_age(f"{LEASES}/{name}")
        if found is None:
            return False
        who = found[0].decode(errors="replace")
        age = max(found[1], self._unchanged(name, *found))
        fresh = owner.alive(who, age)
        if fresh and owner.is_elsewhere(who) and found[0] not in self._reported:
            self._reported.add(found[0])
            log.info(
                f"{name} is leased by another machine, {owner.host_of(who)}, which renewed its "
                f"lease {max(age, 0):.0f} s ago; if it is gone, the work is taken over in "
                f"{owner.LEASE - age:.0f} s."
            )
        return fresh

    def _unchanged(self, name: str, content: bytes, age: float) -> float:
        """Return the seconds for which this process has seen a lease unchanged."""
        written, now = time.time() - age, time.monotonic()
        was = self._seen.get(name)
        if was is None or was[0] != content or abs(was[1] - written) > 1:
            self._seen[name] = was = (content, written, now)
        return now - was[2]
