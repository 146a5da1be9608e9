"""Rows → batches on the device, read ahead by threads.

Reading ahead never decides anything. The mixture is asked in order, and what was drawn but not
yet consumed can be put back: new weights hold from the very next batch on, and what is
checkpointed is what was consumed. So neither threads nor depth can be told from the order or from
the batches. The price of new weights is that what was read ahead under the old ones is read
again, from chunks that are mostly still in memory.

Each thread fills memory of its own, pinned where the device is CUDA, over and over; the copy is
asynchronous, and the stored integers turn into targets on the device.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ddk_cache import SPLITS, Cache, SparseTargets
from ddk_train.data.decode import Dequantizer
from ddk_train.data.mixture import Draw, Floats, Mixture

log = logging.getLogger(__name__)

THREADS = 2
"""Threads that read. Reading and decompressing let the interpreter go."""

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


class Buffers:
    """Host memory for the stored rows of one batch, used again for each."""

    def __init__(self, arrays: Mapping[str, Any], device: torch.device) -> None:
        self.device, cuda = device, device.type == "cuda"
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.tensors = {name: t.pin_memory() if cuda else t for name, t in tensors.items()}
        self.arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        self._copied = torch.cuda.Event() if cuda else None

    def wait(self) -> None:
        """Wait until the last copy out of this memory is done."""
        if self._copied:
            self._copied.synchronize()

    def to_device(self) -> dict[str, torch.Tensor]:
        """Begin to copy to the device; on a CPU the tensors are this memory itself."""
        moved = {name: t.to(self.device, non_blocking=True) for name, t in self.tensors.items()}
        if self._copied:
            self._copied.record(torch.cuda.current_stream(self.device))
        return moved


class Ahead(NamedTuple):
    """A batch under way."""

    before: dict[str, Any]
    """State of the mixture before it was drawn."""
    batch: Future[Batch]


class Loader(IterableDataset[Batch]):
    """Endless batches of training rows of a cache in the mixture's order.

    `state_dict` and `load_state_dict` are those that torchdata's StatefulDataLoader and
    accelerate's `register_for_checkpointing` ask for; the state is as of the last batch consumed.
    """

    def __init__(
        self,
        cache: Cache,
        mixture: Mixture,
        device: torch.device,
        *,
        share: slice = slice(None),
        temperature: float = 1.0,
        threads: int = THREADS,
        depth: int = DEPTH,
    ) -> None:
        """Read with so many threads (0: when a batch is asked for) so many batches ahead.

        `share` are the rows of each step that this process reads; the order is that of all.
        """
        self.cache, self.mixture, self.device, self.depth = cache, mixture, device, depth
        self.share = share
        self._names = [order.name for order in mixture.orders]
        self._dequantize = Dequantizer(cache, self._names, device, temperature)
        self._weights: Floats = mixture.sizes / mixture.sizes.sum()
        self._pool = ThreadPoolExecutor(threads, "reader") if threads else None
        self._ahead: deque[Ahead] = deque()
        self._free: SimpleQueue[Buffers] = SimpleQueue()
        rows = len(range(mixture.rows)[share])
        for _ in range(max(1, threads)):
            self._free.put(Buffers(cache.buffers(rows, self._dequantize.arrays), device))

    @property
    def weights(self) -> Floats:
        """Return the (D) sampling weights of the next batch; at first in proportion to rows."""
        return self._weights

    @weights.setter
    def weights(self, weights: Floats) -> None:
        if not np.array_equal(weights, self._weights):
            self._put_back()
            self._weights = weights

    def batches(self, weights: Floats, count: int) -> Iterator[Batch]:
        """Yield the next `count` batches under these weights."""
        self.weights = weights
        for _ in range(count):
            yield next(self)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        before = self._state()
        if self._pool is None:
            batch = self._read(self.mixture.next(self._weights), self.mixture.state_dict())
        else:
            while len(self._ahead) <= self.depth:
                self._ahead.append(self._begin(self._pool))
            try:
                batch = self._ahead[0].batch.result()
            except BaseException:
                self._put_back()  # nobody will want the others, and each may take as long to fail
                raise
            self._ahead.popleft()
        self._tell_epochs(before, batch.state)
        return dataclasses.replace(batch, wait=time.perf_counter() - began)

    def _begin(self, pool: ThreadPoolExecutor) -> Ahead:
        before = self.mixture.state_dict()
        draw = self.mixture.next(self._weights)
        return Ahead(before, pool.submit(self._read, draw, self.mixture.state_dict()))

    def _read(self, draw: Draw, state: dict[str, Any]) -> Batch:
        domains, rows = draw.domain[self.share], draw.row[self.share]
        names = [self._names[number] for number in domains]
        buffers = self._free.get()
        try:
            buffers.wait()
            self.cache.fill(SPLITS[0], names, rows, buffers.arrays)
            stored = buffers.to_device()
            tokens = stored["tokens"].to(torch.int64, copy=True)
            mask = stored["loss_mask"].to(torch.bool, copy=True)
            most = self._dequantize.most(buffers.arrays)
            targets = self._dequantize(stored, torch.from_numpy(domains).to(self.device), most)
            return Batch(draw, tokens, mask, targets, state)
        finally:
            self._free.put(buffers)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch consumed as plain JSON values, floats exact."""
        weights = [float(weight).hex() for weight in self._weights]
        return {"mixture": self._state(), "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._put_back()
        self.mixture.load_state_dict(state["mixture"])
        self._weights = np.array([float.fromhex(weight) for weight in state["weights"]])

    def close(self) -> None:
        """Let the threads go; nothing can be read any more."""
        self._put_back()
        if self._pool:
            self._pool.shutdown()

    def epochs(self) -> list[float]:
        """Return how often each domain has been gone through by what was consumed."""
        return self.mixture.epochs(self._state())

    def _state(self) -> dict[str, Any]:
        return self._ahead[0].before if self._ahead else self.mixture.state_dict()

    def _put_back(self) -> None:
        """Forget what was drawn ahead."""
        state = self._state()
        while self._ahead:
            self._ahead.pop().batch.cancel()
        self.mixture.load_state_dict(state)

    def _tell_epochs(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        were, are = self.mixture.begun(before), self.mixture.begun(after)
        for order, was, now in zip(self.mixture.orders, were, are, strict=True):
            if now > was:
                log.info(
                    f"all {order.rows:,} rows of {order.name} are used: epoch {now + 1}, reordered"
                )
