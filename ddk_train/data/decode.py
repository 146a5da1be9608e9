"""Stored integers → tokens, mask and targets, on the device that computes.

The bus carries what the cache stores, a seventh of the bytes of decoded targets; the rest is a
cumulative sum and a few table look-ups. Training rows and held-out rows are decoded by this code
alone. The reference is the cache's NumPy codec: the tables are the same, and sums may differ in
their last bit. On one device the result has the same bits each time.

Shape letters: B rows, S positions, K the most entries of a position in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ddk_cache import Cache, SparseTargets
from ddk_cache.isolation import positions_of
from ddk_cache.types import DRAWN_COUNT, DRAWN_PROB, EXACT_COUNT, LABEL_KEPT
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
    positions: torch.Tensor | None
    """(B, S+1) int64 places of tokens in their documents, where those are kept apart."""


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

    def read(self, split: str, domain_B: Ints, row_B: Ints) -> Decoded:
        """Read rows, each by the number of its domain and its row number, and decode them.

        Raises:
            UnfinishedCacheError, CorruptCacheError: see `Cache.fill`.
        """
        arrays = self.cache.buffers(len(row_B), self.arrays)
        self.cache.fill(split, [self.domains[number] for number in domain_B], row_B, arrays)
        stored = {name: torch.from_numpy(a).to(self.device) for name, a in arrays.items()}
        return self(stored, torch.from_numpy(domain_B).to(self.device), self.most(arrays))

    def most(self, stored: Mapping[str, Any]) -> int:
        """Return K of stored rows in host memory; on a device, it would have to wait for it."""
        counts = stored["position_fields"][:, : DRAWN_COUNT + 1 if self.sampled else DRAWN_COUNT]
        return int(counts.sum(1, dtype=np.int64).max(initial=1))

    def __call__(self, stored: Stored, domain_B: torch.Tensor, most: int) -> Decoded:
        """Decode rows of the `domain_B`-th domains, of which `most` is K."""
        return Decoded(
            stored["tokens"].to(torch.int64, copy=True),
            stored["loss_mask"].to(torch.bool, copy=True),
            self.targets(stored, domain_B, most),
            positions_of(stored["segments"]) if "segments" in stored else None,
        )

    def targets(self, stored: Stored, domain_B: torch.Tensor, most: int) -> Targets:
        """Return the (B, S, K) targets of rows; entries and tail sum to one.

        A position with fewer than K entries is padded with the id −1 and probability 0.
        """
        slots = Slots.of(stored, most)
        ids_BSK = self._ids(stored["target_ids"], domain_B, slots)
        labels_BS1 = stored["tokens"][:, 1:, None].long()
        ids_BSK = ids_BSK.where(slots.inside, torch.where(slots.at_label, labels_BS1, -1))
        probs_BSK, tail_BS = self._probs(stored, slots)
        if self.place is not None:
            tail_BS = look_up(self.probs, stored["tempered_tail_logprob"][:, self.place])
            probs_BSK = probs_BSK ** (1 / self.temperature)
            total_BS = probs_BSK.sum(-1, dtype=torch.float64)
            probs_BSK *= ((1 - tail_BS) / total_BS).float()[..., None]
        return SparseTargets(ids_BSK, probs_BSK, tail_BS)

    def _ids(self, planes: torch.Tensor, domain_B: torch.Tensor, slots: Slots) -> torch.Tensor:
        """Return (B, S, K) int64 ids of (B, bytes, S · size) planes, of any value as padding."""
        steps = planes[:, 0].int()
        for place in range(1, planes.shape[1]):
            steps |= planes[:, place].int() << 8 * place
        begin_BS1 = slots.count.cumsum(1, dtype=torch.int32) - slots.count
        sums_BSK = take(steps, begin_BS1 + slots.order, slots.inside).cumsum(-1)
        # The drawn entries start from zero again.
        last_BS1 = sums_BSK.gather(-1, (slots.exact - 1).clamp(min=0).long())
        drawn_BSK = (slots.order >= slots.exact) & (slots.exact > 0)
        numbers_BSK = (sums_BSK - last_BS1 * drawn_BSK).clamp_(0, self.vocab_size - 1)
        numbers_BSK += (domain_B * self.vocab_size)[:, None, None]
        return look_up(self.ids, numbers_BSK).long()

    def _probs(self, stored: Stored, slots: Slots) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (B, S, K) probabilities at temperature 1, and the (B, S) tail."""
        begin_BS1 = slots.exact.cumsum(1, dtype=torch.int32) - slots.exact
        codes_BSK = take(stored["target_probs"], begin_BS1 + slots.order, slots.ahead)
        probs_BSK = look_up(self.values, codes_BSK).double()  # code 0, and padding, is 0
        # Code 0 is what the others leave of one; the true token is where no other is exact.
        coded_BSK = slots.ahead & (codes_BSK == 0)
        implied_BSK = torch.where(slots.exact > 0, coded_BSK, slots.at_label)
        shared_BS1 = torch.zeros_like(slots.exact, dtype=torch.bool)
        tail_BS1 = torch.zeros_like(slots.exact, dtype=torch.float64)
        if self.sampled:
            code_BS1 = stored["position_fields"][:, DRAWN_PROB, :, None]
            share_BS1 = look_up(self.shares, code_BS1)
            shared_BS1 = code_BS1 == self.rest_code
            drawn_BSK = slots.inside & ~slots.ahead
            implied_BSK = torch.where(shared_BS1, drawn_BSK, implied_BSK)
            probs_BSK += share_BS1 * (drawn_BSK & ~implied_BSK)
        else:
            tail_BS1 = look_up(self.probs, stored["tail_logprob"])[..., None].double()
        # What is left is not less than any other but the true token, unless it is shared.
        least_BS1 = probs_BSK.amax(-1, keepdim=True).masked_fill(shared_BS1, 0.0)
        label_BS1 = look_up(self.probs, stored["label_logprob"])[..., None]
        probs_BSK += label_BS1 * (slots.at_label & ~implied_BSK)
        rest_BS1 = 1 - tail_BS1 - probs_BSK.sum(-1, keepdim=True)
        rest_BS1 /= implied_BSK.sum(-1, keepdim=True).clamp(min=1)
        probs_BSK += rest_BS1.maximum(least_BS1) * implied_BSK
        scale_BS1 = 1 / (probs_BSK.sum(-1, keepdim=True) + tail_BS1)
        return (probs_BSK * scale_BS1).float(), (tail_BS1 * scale_BS1).float().squeeze(-1)


@dataclass(frozen=True)
class Slots:
    """Which of K slots of each position hold what: exact entries, drawn ones, the true token."""

    order: torch.Tensor
    """(K) the number of each slot."""
    exact: torch.Tensor
    """(B, S, 1) entries that are stored exactly; they come first."""
    count: torch.Tensor
    """(B, S, 1) stored entries."""
    inside: torch.Tensor
    """(B, S, K) slots of stored entries."""
    ahead: torch.Tensor
    """(B, S, K) slots of exact entries."""
    at_label: torch.Tensor
    """(B, S, K) the slot behind the stored entries, where the true token is an exact entry."""

    @classmethod
    def of(cls, stored: Stored, most: int) -> Slots:
        """Return the slots of stored rows."""
        fields = stored["position_fields"].int()[..., None]
        exact = count = fields[:, EXACT_COUNT]
        if fields.shape[1] > DRAWN_COUNT:
            count = exact + fields[:, DRAWN_COUNT]
        order = torch.arange(most, dtype=torch.int32, device=exact.device)
        at_label = fields[:, LABEL_KEPT].bool() & (order == count)
        return cls(order, exact, count, order < count, order < exact, at_label)


def take(row: torch.Tensor, place_BSK: torch.Tensor, inside_BSK: torch.Tensor) -> torch.Tensor:
    """Return (B, S, K) values of (B, width) at places, 0 where a place is not inside."""
    place_BSK = place_BSK.masked_fill(~inside_BSK, 0)
    found = row.gather(1, place_BSK.flatten(1).long()).view(place_BSK.shape)
    return found * inside_BSK


def look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the entries of a table at integer codes of any type, in the shape of the codes."""
    index = codes if codes.dtype == torch.int64 else codes.to(torch.int32)
    return table.index_select(0, index.flatten()).view(codes.shape)
