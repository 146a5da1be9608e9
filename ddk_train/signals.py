"""Ctrl-C and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

log = logging.getLogger(__name__)


@dataclass
class Stop:
    """Whether somebody asked the run to stop."""

    requested: bool = False

    def request(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; a second one stops at once."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.info("stopping after this step; a checkpoint will be written")


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a request to stop after the current step."""
    stop, before = Stop(), {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, stop.request)
        except ValueError:  # not the main thread: whoever runs us there stops us in its own way
            break
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
