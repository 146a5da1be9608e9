"""Work that several processes share, item by item, without a scheduler.

Each process takes a lease on an item before it works on it and moves on where another has it.
Processes begin with different items, every n-th of n processes, so that they seldom meet; one that
is done early takes what is left, and what a dead process had leased. At the end all wait for the
last item, so a job puts its small items last. The price is a look at the storage for every item.
"""

from __future__ import annotations

import itertools
import time
from threading import Event
from typing import NamedTuple, Protocol, TypeVar

from ddk_cache.errors import InputError
from ddk_cache.storage.lease import Leases

Item = TypeVar("Item")

POLL = 0.5
"""Seconds between two looks at what other processes have finished."""


class Part(NamedTuple):
    """The part of one process in shared work."""

    rank: int
    """Which process this is, counted from 0."""
    world: int
    """The number of processes."""
    stop: Event
    """Set once the process shall end after the item in hand."""


class Job(Protocol[Item]):
    """Items of work whose results any process can see."""

    def todo(self) -> list[Item]:
        """Return the items that are not done, the small ones last."""

    def done(self, item: Item) -> bool:
        """Return whether an item is done."""

    def lease(self, item: Item) -> str:
        """Return the name of the lease on an item."""

    def work(self, item: Item) -> None:
        """Do an item and release its lease, at the latest in `flush`."""

    def flush(self) -> None:
        """Finish every item that was begun."""


def share(job: Job[Item], leases: Leases, rank: int, world: int, stop: Event | None = None) -> None:
    """Do items of a job until none is left, done by this process or by others.

    Raises:
        KeyboardInterrupt: `stop` was set; the items that were begun are done.
    """
    while items := job.todo():
        worked = False
        for item in itertools.chain(*(items[(rank + n) % world :: world] for n in range(world))):
            if stop and stop.is_set():
                job.flush()
                raise KeyboardInterrupt
            if job.done(item) or not leases.take(job.lease(item)):
                continue
            if job.done(item):  # finished and released between the two looks
                leases.release(job.lease(item))
                continue
            job.work(item)
            worked = True
        job.flush()
        if not worked:
            pause(leases)


def pause(leases: Leases) -> None:
    """Wait for other processes for a moment, and renew the leases that this one holds."""
    leases.beat()
    time.sleep(POLL)


def check_rank(rank: int, world: int) -> None:
    """Raise InputError unless `rank` is one of `world` processes, counted from 0."""
    if not 0 <= rank < world:
        raise InputError(
            f"rank: got {rank} of {world} processes, expected a number from 0 to below {world}."
        )
