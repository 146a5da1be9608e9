"""The actor of a Ray cluster: one teacher in one process, at work on one cache.

It runs the project's own build, and returns an error rather than raising it, because Ray would wrap
it in one of its own.
"""

from __future__ import annotations

import logging
import os
from threading import Event

from ddk_cache.cluster.order import Order
from ddk_cache.console import show_logs
from ddk_cache.errors import DDKError

log = logging.getLogger(__name__)


class Worker:
    """A process that carries out an order together with others."""

    def __init__(self, order: Order, rank: int, world: int) -> None:
        self._order, self._part, self._stop = order, (rank, world), Event()

    def build(self) -> DDKError | None:
        """Build until the cache is finished; return what went wrong.

        An accelerator that failed is of no more use to its process, so the process ends, and Ray
        starts another.
        """
        import torch

        show_logs(first=False)
        try:
            self._order.build(*self._part, self._stop)
        except DDKError as error:
            if isinstance(error.__cause__, getattr(torch, "AcceleratorError", ())):
                log.warning("%s", error)
                os._exit(1)
            return error
        return None

    def stop(self) -> None:
        """Let the build end after the shard in hand."""
        self._stop.set()
