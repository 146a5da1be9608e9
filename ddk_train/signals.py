"""Ctrl-C and SIGTERM as a request to stop after the current step, with a checkpoint."""

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
    """Whether a signal asked the run to stop."""

    requested: bool = False

    def request(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; raise KeyboardInterrupt at the second."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.info("stopping after this step; a checkpoint will be written")


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a request during a with block.

    Outside of the main thread Python cannot set signal handlers; there nothing is changed.
    """
    stop, before = Stop(), {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, stop.request)
        except ValueError:  # not the main thread
            break
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
