"""Stored integers → targets, on the device that trains.

What crosses the bus is what the cache stores, a seventh of the bytes that decoded targets have;
the rest is a running sum and two tables, which a device does in passing. The reference is the
codec of the cache in NumPy: the same tables, and sums that may differ in their last bit. On one
device the result is the same bits each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ddk_cache import Cache, SparseTargets

Stored = Mapping[str, torch.Tensor]
Targets = SparseTargets[torch.Tensor]


class Dequantizer:
    """The codecs of some domains of a cache as tables on a device."""

    def __init__(
        self, cache: Cache, domains: Sequence[str], device: torch.device, temperature: float = 1.0
    ) -> None:
        """Prepare to read rows of these domains at a temperature.

        Raises:
            MismatchError: the cache does not have the targets at this temperature.
        """
        spec = cache.spec
        self.vocab_size, self.sampled = spec.vocab_size, spec.targets.kind == "sampled"
        self.place = None if temperature == 1 else spec.temperature_place(temperature)
        self.arrays = [name for name in spec.arrays if not name.endswith("_logprob")]
        self.arrays.append("tail_logprob" if self.place is None else "tempered_tail_logprob")
        self.probs = torch.from_numpy(cache.logprob.probs(np.arange(2**16))).to(device)
        codecs = [cache.codec(name) for name in domains]
        ids = np.concatenate([codec.numbering.ids for codec in codecs]).astype(np.int32)
        self.ids = torch.from_numpy(ids).to(device)
        values = codecs[0].prob.values ** (1 / temperature)
        self.values = torch.from_numpy(values.astype(np.float32)).to(device)

    def __call__(self, stored: Stored, domain_B: torch.Tensor) -> Targets:
        """Return (B, S, K) targets, in memory of their own, of rows of the `domain_B`-th domains.

        LRU entries and tail sum to one.
        """
        ids_BSK = self._ids(stored["target_ids"], domain_B)
        codes_BSK = stored["target_probs"]
        probs_BSK = look_up(self.values, codes_BSK)
        total_BS = probs_BSK.sum(-1, dtype=torch.float64)
        if self.place is not None:
            tail_BS = look_up(self.probs, stored["tempered_tail_logprob"][:, self.place])
            scale_BS = ((1 - tail_BS) / total_BS).float()
            return SparseTargets(ids_BSK, probs_BSK.mul_(scale_BS[..., None]), tail_BS)
        tail_BS = look_up(self.probs, stored["tail_logprob"])
        scale_BS = (1 / (total_BS + tail_BS)).float()
        probs_BSK.mul_(scale_BS[..., None])
        tail_BS.mul_(scale_BS)
        if self.sampled:
            drawn_BSK = codes_BSK == 0
            count_BS = drawn_BSK.sum(-1)
            share_BS = tail_BS / count_BS.clamp(min=1)
            probs_BSK = probs_BSK.where(~drawn_BSK, share_BS[..., None])
            tail_BS = tail_BS.where(count_BS == 0, 0.0)
        return SparseTargets(ids_BSK, probs_BSK, tail_BS)

    def _ids(self, planes: torch.Tensor, domain_B: torch.Tensor) -> torch.Tensor:
        """Return (B, S, K) int64 ids of (B, bytes, S, K) planes."""
        steps_BSK = planes[:, 0].int()
        for place in range(1, planes.shape[1]):
            steps_BSK |= planes[:, place].int() << 8 * place
        numbers_BSK = steps_BSK.cumsum(-1).clamp_(max=self.vocab_size - 1)
        numbers_BSK += (domain_B * self.vocab_size)[:, None, None]
        return look_up(self.ids, numbers_BSK).long()


def look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the entries of a table at integers of any type, in their shape."""
    index = codes if codes.dtype == torch.int64 else codes.to(torch.int32)
    return table.index_select(0, index.flatten()).view(codes.shape)
