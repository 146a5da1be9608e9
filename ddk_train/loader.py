"""Rows → batches on the device, read ahead by a thread.

Reading ahead never decides anything: the mixture is asked in order, with weights that are known,
and every batch carries the mixture's state as of itself. So what is checkpointed is what was
consumed, and the depth of the read-ahead cannot be told from the order.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddk_cache import SPLITS, Cache, Rows, SparseTargets
from ddk_train.mixture import Draw, Floats, Mixture

DEPTH = 4
"""Batches read ahead."""


@dataclass(frozen=True)
class Batch:
    """The rows of a step, or of a process in it: B rows of S positions with K kept entries."""

    draw: Draw
    """Of the whole step."""
    tokens: torch.Tensor
    """(B, S+1) int64"""
    loss_mask: torch.Tensor
    """(B, S) bool"""
    targets: SparseTargets[torch.Tensor]
    """(B, S, K)"""
    state: dict[str, Any]
    """Of the mixture, after this batch."""
    wait: float = 0.0
    """Seconds that the caller waited for it."""

    def micro(self, size: int) -> Iterator[Batch]:
        """Yield the batch in pieces of at most `size` rows."""
        for first in range(0, len(self.tokens), size):
            part = slice(first, first + size)
            ids, probs, tail = self.targets.ids, self.targets.probs, self.targets.tail
            yield Batch(
                self.draw,
                self.tokens[part],
                self.loss_mask[part],
                SparseTargets(ids[part], probs[part], tail[part]),
                self.state,
            )


def to_device(rows: Rows, draw: Draw, state: dict[str, Any], device: torch.device) -> Batch:
    """Move decoded rows to the device."""

    def move(array: Any) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    targets = SparseTargets(*map(move, (rows.targets.ids, rows.targets.probs, rows.targets.tail)))
    return Batch(draw, move(rows.tokens), move(rows.loss_mask), targets, state)


class Loader:
    """Batches of training rows of a cache in the mixture's order.

    `share` are the rows of each step that this process reads; the order is that of all.
    """

    def __init__(
        self, cache: Cache, mixture: Mixture, device: torch.device, share: slice = slice(None)
    ) -> None:
        self.cache, self.mixture, self.device, self.share = cache, mixture, device, share

    def batches(self, weights: Floats, count: int) -> Iterator[Batch]:
        """Yield the next `count` batches under constant weights."""
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(1) as reader:
            for number in range(count):
                while len(waiting) < DEPTH and number + len(waiting) < count:
                    draw = self.mixture.next(weights)
                    waiting.append(reader.submit(self._read, draw, self.mixture.state_dict()))
                began = time.perf_counter()
                batch = waiting.popleft().result()
                yield dataclasses.replace(batch, wait=time.perf_counter() - began)

    def _read(self, draw: Draw, state: dict[str, Any]) -> Batch:
        parts, places = [], []
        domain, row = draw.domain[self.share], draw.row[self.share]
        for number in np.unique(domain):
            here = np.flatnonzero(domain == number)
            name = self.mixture.orders[number].name
            parts.append(self.cache.read(name, SPLITS[0], row[here]))
            places.append(here)
        rows = _merge(parts, np.argsort(np.concatenate(places)))
        return to_device(rows, draw, state, self.device)


def _merge(parts: list[Rows], order: Any) -> Rows:
    """Join rows and put them in order."""

    def join(arrays: list[Any]) -> Any:
        return np.concatenate(arrays)[order]

    return Rows(
        tokens=join([part.tokens for part in parts]),
        targets=SparseTargets(
            join([part.targets.ids for part in parts]),
            join([part.targets.probs for part in parts]),
            join([part.targets.tail for part in parts]),
        ),
        label_logprob=join([part.label_logprob for part in parts]),
        loss_mask=join([part.loss_mask for part in parts]),
    )
