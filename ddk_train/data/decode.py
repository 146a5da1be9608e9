"""Stored integers → targets, on the device that trains.

What crosses the bus is what the cache stores, a seventh of the bytes that decoded targets have;
the rest is a running sum and a few tables, which a device does in passing. The reference is the
codec of the cache in NumPy: the same tables, and sums that may differ in their last bit. On one
device the result is the same bits each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
        self.temperature = temperature
        self.place = None if temperature == 1 else spec.temperature_place(temperature)
        self.arrays = [n for n in spec.arrays if n != "tempered_tail_logprob" or temperature != 1]
        codecs = [cache.codec(name) for name in domains]
        ids = np.concatenate([codec.numbering.ids for codec in codecs]).astype(np.int32)
        self.ids = torch.from_numpy(ids).to(device)
        self.probs = torch.from_numpy(cache.logprob.probs(np.arange(2**16))).to(device)
        self.values = torch.from_numpy(codecs[0].prob.values).to(device)
        self.shares = torch.from_numpy(codecs[0].drawn.values).to(device)
        self.rest_code = len(self.shares) - 1

    def most(self, stored: Mapping[str, Any]) -> int:
        """Return K, the most entries of a position, of stored rows in host memory."""
        count = stored["exact_count"].astype(np.int64) + stored["label_kept"]
        if self.sampled:
            count += stored["drawn_count"]
        return int(count.max(initial=1))

    def __call__(self, stored: Stored, domain_B: torch.Tensor, most: int) -> Targets:
        """Return (B, S, K) targets of rows of the `domain_B`-th domains; `most` is their K.

        Entries and tail sum to one. A position with fewer entries has the id −1 and probability 0
        behind its own.
        """
        exact_BS1 = stored["exact_count"].int()[..., None]
        count_BS1 = exact_BS1
        if self.sampled:
            count_BS1 = exact_BS1 + stored["drawn_count"][..., None]
        label_BS1 = stored["label_kept"].bool()[..., None]
        order_K = torch.arange(most, dtype=torch.int32, device=exact_BS1.device)
        inside_BSK, ahead_BSK = order_K < count_BS1, order_K < exact_BS1
        at_label_BSK = label_BS1 & (order_K == count_BS1)
        ids_BSK = self._ids(stored["target_ids"], domain_B, exact_BS1, count_BS1, inside_BSK)
        labels_BS1 = stored["tokens"][:, 1:, None].long()
        ids_BSK = ids_BSK.where(inside_BSK, torch.where(at_label_BSK, labels_BS1, -1))

        begin_BS1 = exact_BS1.cumsum(1, dtype=torch.int32) - exact_BS1
        codes_BSK = take(stored["target_probs"], begin_BS1 + order_K, ahead_BSK)
        probs_BSK = look_up(self.values, codes_BSK).double()  # code 0, and padding, is 0
        some_BS1 = exact_BS1 > 0
        # One entry is what is missing to one: the exact one without a code, else the true token.
        implied_BSK = torch.where(some_BS1, ahead_BSK & (codes_BSK == 0), at_label_BSK)
        least_BS1 = probs_BSK.amax(-1, keepdim=True)
        tail_BS1 = torch.zeros_like(least_BS1)
        if self.sampled:
            share_BS1 = look_up(self.shares, stored["drawn_prob"])[..., None]
            rest_BS1 = (stored["drawn_prob"] == self.rest_code)[..., None]
            drawn_BSK = inside_BSK & ~ahead_BSK
            implied_BSK = torch.where(rest_BS1, drawn_BSK, implied_BSK)
            least_BS1 = least_BS1.maximum(share_BS1).masked_fill(rest_BS1, 0.0)
            probs_BSK += share_BS1 * (drawn_BSK & ~implied_BSK)
        else:
            tail_BS1 = look_up(self.probs, stored["tail_logprob"])[..., None].double()
        known_BS1 = look_up(self.probs, stored["label_logprob"])[..., None]
        probs_BSK += known_BS1 * (at_label_BSK & ~implied_BSK)
        rest_BS1 = 1 - tail_BS1 - probs_BSK.sum(-1, keepdim=True)
        each_BS1 = rest_BS1 / implied_BSK.sum(-1, keepdim=True).clamp(min=1)
        probs_BSK += each_BS1.maximum(least_BS1) * implied_BSK
        scale_BS1 = 1 / (probs_BSK.sum(-1, keepdim=True) + tail_BS1)
        probs_BSK = (probs_BSK * scale_BS1).float()
        tail_BS = (tail_BS1 * scale_BS1).float().squeeze(-1)
        if self.place is not None:
            tail_BS = look_up(self.probs, stored["tempered_tail_logprob"][:, self.place])
            probs_BSK = probs_BSK ** (1 / self.temperature)
            total_BS = probs_BSK.sum(-1, dtype=torch.float64)
            probs_BSK *= ((1 - tail_BS) / total_BS).float()[..., None]
        return SparseTargets(ids_BSK, probs_BSK, tail_BS)

    def _ids(
        self,
        planes: torch.Tensor,
        domain_B: torch.Tensor,
        exact_BS1: torch.Tensor,
        count_BS1: torch.Tensor,
        inside_BSK: torch.Tensor,
    ) -> torch.Tensor:
        """Return (B, S, K) int64 ids of (B, bytes, S · size) planes, of any value as padding."""
        steps = planes[:, 0].int()
        for place in range(1, planes.shape[1]):
            steps |= planes[:, place].int() << 8 * place
        order_K = torch.arange(inside_BSK.shape[-1], dtype=torch.int32, device=planes.device)
        begin_BS1 = count_BS1.cumsum(1, dtype=torch.int32) - count_BS1
        sums_BSK = take(steps, begin_BS1 + order_K, inside_BSK).cumsum(-1)
        # The drawn entries count from zero again.
        ahead_BS1 = sums_BSK.gather(-1, (exact_BS1 - 1).clamp(min=0).long())
        numbers_BSK = sums_BSK - ahead_BS1 * ((order_K >= exact_BS1) & (exact_BS1 > 0))
        numbers_BSK = numbers_BSK.clamp_(0, self.vocab_size - 1)
        numbers_BSK += (domain_B * self.vocab_size)[:, None, None]
        return look_up(self.ids, numbers_BSK).long()


def take(row: torch.Tensor, place_BSK: torch.Tensor, inside_BSK: torch.Tensor) -> torch.Tensor:
    """Return (B, S, K) values of (B, width) at places, 0 where a place is not inside."""
    place_BSK = place_BSK.masked_fill(~inside_BSK, 0)
    found = row.gather(1, place_BSK.flatten(1).long()).view(place_BSK.shape)
    return found * inside_BSK


def look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the entries of a table at integers of any type, in their shape."""
    index = codes if codes.dtype == torch.int64 else codes.to(torch.int32)
    return table.index_select(0, index.flatten()).view(codes.shape)
