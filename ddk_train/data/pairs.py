"""Pairs of responses as batches: which come next, and their tokens on the device.

Pairs are drawn as rows are, by the weights of the domains and a keyed permutation, so that a
resumed run sees the same ones. They are read when they are needed: a pair is two short rows of one
chunk, and reading ahead would hide about a millisecond.

Shape letters: N pairs, S positions of the longest response in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddk_cache import TRAIN, Cache, CorruptCacheError, Extent
from ddk_train.data.mixture import Draw, Floats, Ints, Mixture

ARRAYS = ("tokens", "loss_mask", "label_logprob")
"""What a loss on pairs needs of a row."""


@dataclass(frozen=True)
class PairBatch:
    """N pairs; of the axis of two, the first is the teacher's response."""

    tokens: torch.Tensor
    """(N, 2, S+1) int64, the prompt and the response."""
    loss_mask: torch.Tensor
    """(N, 2, S) bool, true at the response."""
    logp: torch.Tensor
    """(N, 2) float32, the teacher's log-probability of each response, nats."""

    @property
    def lengths(self) -> torch.Tensor:
        """Return the (N, 2) tokens of each response."""
        return self.loss_mask.sum(-1)

    def micro(self, pairs: int) -> Iterator[PairBatch]:
        """Yield the batch in pieces of at most `pairs` pairs, cut behind the longest response."""
        for first in range(0, len(self.tokens), pairs):
            part = slice(first, first + pairs)
            mask = self.loss_mask[part]
            end = int(mask.flatten(0, 1).any(0).nonzero().max()) + 1
            yield PairBatch(self.tokens[part, :, : end + 1], mask[..., :end], self.logp[part])


class PairReader:
    """The pairs of a cache, by the numbers of their domains and of the pairs."""

    def __init__(self, pairs: Cache, domains: Sequence[str], device: torch.device) -> None:
        self.pairs, self.domains, self.device = pairs, list(domains), device

    def read(self, split: str, domain_N: Ints, pair_N: Ints) -> PairBatch:
        """Read pairs.

        Raises:
            CorruptCacheError: a response has no token, or stored bytes have changed.
        """
        arrays = self.pairs.buffers(2 * len(pair_N), ARRAYS)
        rows = np.stack([2 * pair_N, 2 * pair_N + 1], 1).ravel()
        names = [self.domains[number] for number in np.repeat(domain_N, 2)]
        self.pairs.fill(split, names, rows, arrays)
        mask = arrays["loss_mask"].astype(bool)
        if not mask.any(-1).all():
            raise CorruptCacheError(f"{self.pairs.where}: a response of {split} has no token.")
        logprob = self.pairs.logprob.decode(arrays["label_logprob"])
        logp = np.where(mask, logprob, 0.0).sum(-1, dtype=np.float64)
        tokens = np.where(arrays["tokens"] < self.pairs.spec.vocab_size, arrays["tokens"], 0)
        shaped = (
            torch.from_numpy(a).to(self.device).unflatten(0, (-1, 2))
            for a in (tokens.astype(np.int64), mask, logp.astype(np.float32))
        )
        return PairBatch(*shaped)


class PairOrder:
    """Which pairs come next, over the domains of a run that have pairs."""

    def __init__(
        self, pairs: Cache, domains: Sequence[str], count: int, seed: int, share: slice
    ) -> None:
        """Draw `count` pairs per step, of which this process takes its share."""
        self.domains = [name for name in domains if name in pairs and len(pairs[name].train)]
        self._at = np.array([list(domains).index(name) for name in self.domains], np.int64)
        self._mixture = Mixture(
            {name: halved(pairs.extents(name, TRAIN)) for name in self.domains},
            chunk_rows=pairs.spec.chunk_rows // 2,
            rows=count,
            seed=seed,
        )
        self._share = share

    def next(self, weights: Floats) -> tuple[Draw, Draw]:
        """Return the next step's pairs under (D) weights of all domains: all, and this share.

        The numbers of domains are those among `domains`.
        """
        some = weights[self._at]
        draw = self._mixture.next(some / some.sum())
        return draw, Draw(draw.domain[self._share], draw.row[self._share])

    def counts(self, draw: Draw, domains: int) -> Ints:
        """Return the (D) pairs of each domain of the run in a draw."""
        found = np.zeros(domains, np.int64)
        np.add.at(found, self._at[draw.domain], 1)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state by domain: plain JSON values."""
        return self._mixture.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self._mixture.load_state_dict(state)


def halved(extents: Sequence[Extent]) -> list[Extent]:
    """Return where the pairs of some rows lie, counted in pairs."""
    return [Extent(extent.start // 2, extent.rows // 2) for extent in extents]
