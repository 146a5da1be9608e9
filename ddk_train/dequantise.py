"""Stored integers → targets, on the device that trains.

What crosses the bus is what the cache stores, about a third of the bytes that decoded targets
have; the rest is a table and a division for each entry, which a device does in passing. The
reference is the codec of the cache in NumPy: the same table, and sums that may differ in their
last bit. On one device the result is the same bits each time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ddk_cache import Cache, SparseTargets

NOT_FOR_TRAINING = {"label_logprob"}
"""Stored arrays that a training step does not need."""


class Dequantiser:
    """The codec of a cache as a table on a device."""

    def __init__(self, cache: Cache, device: torch.device) -> None:
        self.arrays = [name for name in cache.spec.arrays if name not in NOT_FOR_TRAINING]
        codes = np.arange(2**16, dtype=np.uint16)
        self.table = torch.from_numpy(cache.codec.probs(codes)).to(device)

    def __call__(self, stored: Mapping[str, torch.Tensor]) -> SparseTargets[torch.Tensor]:
        """Return (B, S, K) targets in memory of their own; kept entries and tail sum to one."""
        probs, tail = (self._probs(stored[name]) for name in ("target_logprobs", "tail_logprob"))
        scale = (1 / (probs.sum(-1, dtype=torch.float64) + tail)).float()
        ids = stored["target_ids"].to(torch.int64, copy=True)
        return SparseTargets(ids, probs.mul_(scale[..., None]), tail.mul_(scale))

    def _probs(self, codes: torch.Tensor) -> torch.Tensor:
        """Return float32 probabilities of uint16 codes."""
        return self.table.index_select(0, codes.to(torch.int32).flatten()).view(codes.shape)
