"""One trainer per run directory: a lock file that survives no crash.

The file names its owner. On one host a dead owner is recognized at once, so that a killed run is
resumed without waiting; an owner on another host counts as alive while its file is renewed, which
a thread does, so that neither a long measurement nor a large checkpoint looks like a death.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from ddk_cache import InputError, atomic, owner

BEAT = 15.0
"""Seconds between two renewals: eight within `owner.LEASE`."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` during a with block.

    Raises:
        InputError: another live process holds it.
    """
    mine = owner.current().encode()
    while not atomic.create(path, mine, flush=False):
        _remove_if_stale(path)
    stop = Event()
    thread = Thread(target=_renew, args=(path, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(FileNotFoundError):
            if path.read_bytes() == mine:
                path.unlink()


def _renew(path: Path, stop: Event) -> None:
    while not stop.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _remove_if_stale(path: Path) -> None:
    """Remove the lock of a dead owner. It is renamed first, which only one process can do."""
    try:
        holder = path.read_bytes()
        _check_dead(path, holder)
        aside = path.with_name(f"{path.name}~{owner.current()}{atomic.PARTIAL}")
        path.rename(aside)
        if aside.read_bytes() != holder:  # another process was faster and holds the lock
            aside.rename(path)
        aside.unlink(missing_ok=True)
    except FileNotFoundError:
        return


def _check_dead(path: Path, holder: bytes) -> None:
    name = holder.decode(errors="replace")
    if owner.alive(name, owner.age(path)):
        host, pid, _ = [*name.split("+"), "", ""][:3]
        raise InputError(
            f"{path.parent} is in use by another run (process {pid} on {host}). Wait for its end, "
            "or give another run directory."
        )
