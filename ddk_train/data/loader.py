"""Rows → batches on the device, read ahead by threads: the data of `ddk-train`.

Reading ahead changes nothing but speed. Rows are drawn from the mixture in order, and batches
drawn but not yet consumed can be put back: new weights hold from the very next batch, and a
checkpoint records what was consumed. So order and batches do not depend on threads or depth. The
price of new weights is that batches read ahead under the old ones are discarded and other rows
are read, from chunks that are mostly still in memory.

Each thread reuses a buffer of its own, pinned where the device is CUDA; the copy is asynchronous,
and the stored integers are decoded on the device. For DataLoader workers and other training
loops there is `ddk_train.data.dataset`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch

from ddk_cache import TRAIN, Cache, SparseTargets
from ddk_train.data.decode import Dequantizer
from ddk_train.data.mixture import Draw, Floats, Ints, Mixture

log = logging.getLogger(__name__)

THREADS = 2
"""Threads that read. Reading and decompressing release the GIL."""

DEPTH = 4
"""Batches read ahead."""


@dataclass(frozen=True)
class Batch:
    """The rows of a step, or the share of one process: B rows, S positions, K kept entries."""

    draw: Draw
    """The rows of the whole step, over all processes."""
    tokens: torch.Tensor
    """(B, S+1) int64"""
    loss_mask: torch.Tensor
    """(B, S) bool"""
    targets: SparseTargets[torch.Tensor]
    """(B, S, K)"""
    positions: torch.Tensor | None
    """(B, S+1) int64 places of tokens in their documents, where those are kept apart."""
    counted: Ints
    """(B) counted positions of each row, in host memory: nobody waits for the device to know."""
    teacher_loss: Floats
    """(B) the teacher's loss on each row, summed over its counted positions; nats."""
    state: dict[str, Any]
    """State of the mixture after this batch."""
    wait: float = 0.0
    """Seconds that the caller waited for this batch."""

    def micro(self, size: int) -> Iterator[Batch]:
        """Yield the batch in pieces of at most `size` rows."""
        for first in range(0, len(self.tokens), size):
            part = slice(first, first + size)
            yield dataclasses.replace(
                self,
                tokens=self.tokens[part],
                loss_mask=self.loss_mask[part],
                targets=self.targets.map(itemgetter(part)),
                positions=None if self.positions is None else self.positions[part],
                counted=self.counted[part],
                teacher_loss=self.teacher_loss[part],
            )


DOMAIN = "domain"
"""Name of the buffer for the number of each row's domain, which is not an array of the cache."""


class Buffers:
    """Host memory for the stored rows of one batch, reused for the next."""

    def __init__(self, arrays: Mapping[str, Any], rows: int, device: torch.device) -> None:
        self.device, cuda = device, device.type == "cuda"
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        tensors[DOMAIN] = torch.empty(rows, dtype=torch.int64)
        self.tensors = {name: t.pin_memory() if cuda else t for name, t in tensors.items()}
        self.arrays = {name: self.tensors[name].numpy() for name in arrays}
        # A thread that waits must not spin: others need its core.
        self._copied = torch.cuda.Event(blocking=True) if cuda else None

    def wait(self) -> None:
        """Wait until the last copy from this memory is done."""
        if self._copied:
            self._copied.synchronize()

    def to_device(self, domain_B: Ints) -> dict[str, torch.Tensor]:
        """Start the copy to the device; on a CPU, return the memory itself.

        A copy from memory that is not pinned would wait for all that the device was given before.
        """
        self.tensors[DOMAIN].copy_(torch.from_numpy(domain_B))
        moved = {name: t.to(self.device, non_blocking=True) for name, t in self.tensors.items()}
        if self._copied:
            self._copied.record(torch.cuda.current_stream(self.device))
        return moved


class Ahead(NamedTuple):
    """A batch that is being read."""

    before: dict[str, Any]
    """State of the mixture before it was drawn."""
    batch: Future[Batch]


class Loader:
    """Endless batches of training rows of a cache in the mixture's order.

    An iterator, not a dataset: torch's DataLoader refuses it, since each worker would repeat every
    row. The state is as of the last batch consumed.
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
        """Read `depth` batches ahead with `threads` threads; with 0 threads, read on demand.

        `share` selects the rows of each step that this process reads; the order of rows is over
        all processes.
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
            arrays = cache.buffers(rows, self._dequantize.arrays)
            self._free.put(Buffers(arrays, rows, device))

    @property
    def weights(self) -> Floats:
        """Return the (D) sampling weights of the next batch; initially proportional to rows."""
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
                self._put_back()  # the others would not be used, and each may take as long to fail
                raise
            self._ahead.popleft()
        self._log_epochs(before, batch.state)
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
            self.cache.fill(TRAIN, names, rows, buffers.arrays)
            stored = buffers.to_device(domains)
            most = self._dequantize.most(buffers.arrays)
            counted = np.count_nonzero(buffers.arrays["loss_mask"], 1)
            decoded = self._dequantize(stored, stored[DOMAIN], most)
            teacher_loss = self._teacher(buffers.arrays)
            return Batch(draw, *decoded, counted, teacher_loss, state)
        finally:
            self._free.put(buffers)

    def _teacher(self, stored: Mapping[str, Any]) -> Floats:
        """Return (B) the teacher's summed loss on stored rows."""
        loss_BS = -self.cache.logprob.decode(stored["label_logprob"])
        return np.asarray(loss_BS.sum(1, where=stored["loss_mask"].astype(bool), dtype=np.float64))

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch consumed: plain JSON values, floats exact."""
        weights = [float(weight).hex() for weight in self._weights]
        return {"mixture": self._state(), "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self._put_back()
        self.mixture.load_state_dict(state["mixture"])
        self._weights = np.array([float.fromhex(weight) for weight in state["weights"]])

    def close(self) -> None:
        """End the threads; the loader cannot be used afterwards."""
        self._put_back()
        if self._pool:
            self._pool.shutdown()

    def epochs(self) -> list[float]:
        """Return how many times the consumed batches went through each domain."""
        return self.mixture.epochs(self._state())

    def _state(self) -> dict[str, Any]:
        return self._ahead[0].before if self._ahead else self.mixture.state_dict()

    def _put_back(self) -> None:
        """Discard the batches drawn ahead."""
        state = self._state()
        while self._ahead:
            self._ahead.pop().batch.cancel()
        self.mixture.load_state_dict(state)

    def _log_epochs(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        were, are = self.mixture.begun(before), self.mixture.begun(after)
        for order, was, now in zip(self.mixture.orders, were, are, strict=True):
            if now > was:
                log.info(
                    f"all {order.rows:,} rows of {order.name} are used: epoch {now + 1}, reordered"
                )
