"""Stored integers → tokens, mask and targets, on the device that computes.

The bus carries what the cache stores, a seventh of the bytes of decoded targets; the rest is a
cumulative sum and two table look-ups. Training rows and held-out rows are decoded by this code
alone. The reference is the cache's NumPy codec: the tables are the same, and sums may differ in
their last bit. On one device the result has the same bits each time.

Shape letters: B rows, S positions, K kept entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ddk_cache import Cache, SparseTargets
from ddk_train.data.mixture import Ints

Stored = Mapping[str, torch.Tensor]
Targets = SparseTargets[torch.Tensor]


class Decoded(NamedTuple):
    """Rows on a device, in memory of their own."""

    tokens: torch.Tensor
    """(B, S+1) int64"""
    loss_mask: torch.Tensor
    """(B, S) bool, where the loss counts."""
    targets: Targets
    """(B, S, K)"""


class Dequantizer:
    """The codecs of some domains of a cache, as tables on a device."""

    def __init__(
        self, cache: Cache, domains: Sequence[str], device: torch.device, temperature: float = 1.0
    ) -> None:
        """Prepare to decode rows of these domains at a temperature.

        Raises:
            MismatchError: the cache does not have the targets at this temperature.
        """
        spec = cache.spec
        self.cache, self.domains, self.device = cache, list(domains), device
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

    def read(self, split: str, domain_B: Ints, row_B: Ints) -> Decoded:
        """Read rows, each by the number of its domain and its row number, and decode them.

        Raises:
            UnfinishedCacheError, CorruptCacheError: see `Cache.fill`.
        """
        arrays = self.cache.buffers(len(row_B), self.arrays)
        self.cache.fill(split, [self.domains[number] for number in domain_B], row_B, arrays)
        stored = {name: torch.from_numpy(a).to(self.device) for name, a in arrays.items()}
        return self(stored, torch.from_numpy(domain_B).to(self.device))

    def __call__(self, stored: Stored, domain_B: torch.Tensor) -> Decoded:
        """Decode rows of the `domain_B`-th domains; kept entries and tail sum to one."""
        return Decoded(
            stored["tokens"].to(torch.int64, copy=True),
            stored["loss_mask"].to(torch.bool, copy=True),
            self.targets(stored, domain_B),
        )

    def targets(self, stored: Stored, domain_B: torch.Tensor) -> Targets:
        """Return the (B, S, K) targets of rows of the `domain_B`-th domains."""
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
        """Return the (B, S, K) int64 ids of (B, bytes, S, K) byte planes."""
        steps_BSK = planes[:, 0].int()
        for place in range(1, planes.shape[1]):
            steps_BSK |= planes[:, place].int() << 8 * place
        numbers_BSK = steps_BSK.cumsum(-1).clamp_(max=self.vocab_size - 1)
        numbers_BSK += (domain_B * self.vocab_size)[:, None, None]
        return look_up(self.ids, numbers_BSK).long()


def look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the entries of a table at integer codes of any type, in the shape of the codes."""
    index = codes if codes.dtype == torch.int64 else codes.to(torch.int32)
    return table.index_select(0, index.flatten()).view(codes.shape)
