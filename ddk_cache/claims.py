"""Which process works on what: a file for each claim, and no lock that survives a crash.

A claim is a file that only one process can create; one whose owner is gone is taken over. That
two processes then do the same work for a moment is possible and harmless, because what they make
is a function of the plan and appears whole; so there is no need for anything stronger, and no
scheduler.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ddk_cache import process

FOLDER = "claims"

BEAT = 5.0
"""Seconds between two signs of life, at least."""


class Claims:
    """The claims of one process on the work of one cache."""

    def __init__(self, root: Path) -> None:
        self.folder = root / FOLDER
        self._held: set[Path] = set()
        self._beaten = 0.0

    def take(self, name: str) -> bool:
        """Claim a piece of work; False where this or another live process has it."""
        path = self.folder / name
        if path in self._held:
            return False
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                if _fresh(path):
                    return False
                path.unlink(missing_ok=True)
                continue
            except FileNotFoundError:  # the folder went between the two lines
                continue
            with os.fdopen(handle, "w") as file:
                file.write(process.owner())
            self._held.add(path)
            return True

    def release(self, name: str) -> None:
        """Give a claim back."""
        path = self.folder / name
        self._held.discard(path)
        path.unlink(missing_ok=True)

    def release_all(self) -> None:
        """Give all claims back, and those of the dead with them."""
        for path in self.folder.iterdir() if self.folder.is_dir() else []:
            if path in self._held or not _fresh(path):
                self.release(path.name)

    def beat(self) -> None:
        """Give a sign of life, if the last one is a while ago."""
        if time.monotonic() - self._beaten < BEAT:
            return
        self._beaten = time.monotonic()
        for path in list(self._held):
            try:
                os.utime(path)
            except FileNotFoundError:  # taken over; what we make is the same
                self._held.discard(path)


def _fresh(path: Path) -> bool:
    """Return whether the owner of a claim is alive."""
    try:
        owner = path.read_text()
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    return process.alive(owner, path) if owner else age < BEAT  # empty: just being made
