"""Learning from pairs of responses: the gradient of a step, and a measurement on held-out pairs.

The trainer adds the gradient of the pairs to that of the rows before each optimizer step, so
everything else (weights, intervals, checkpoints, reports) is shared. The price is a second set of
forward passes per step.

Shape letters: N pairs, D domains of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from ddk_cache import TRAIN, VALIDATION, Cache, InputError
from ddk_train.data.mixture import Floats, Ints
from ddk_train.data.pairs import PairBatch, PairOrder, PairReader, halved
from ddk_train.distributed import Processes
from ddk_train.evaluate import sample
from ddk_train.loss.preference import PairLoss, PairTerms
from ddk_train.loss.sequence import row_sums

SUMS = ("pair_loss", "margin", "preferred", "reward_teacher", "reward_student")
"""What is logged of a step, each a mean over pairs: the loss, the difference of the implicit
rewards, the share of pairs in which the teacher's response has the larger one, and both rewards."""


MeasuredPairs = Mapping[str, Mapping[str, float | None]]
"""The means that `SUMS` names over the held-out pairs of each domain; None where it has none."""


class Learned(NamedTuple):
    """What a step learned from pairs."""

    metrics: dict[str, float]
    """By the names of `SUMS`."""
    tokens: list[int]
    """(D) counted positions."""
    rows: list[int]
    """(D) rows, two per pair."""


class PairLearner:
    """The pairs of a run, and the loss on them."""

    def __init__(
        self,
        pairs: Cache,
        domains: Sequence[str],
        processes: Processes,
        terms: PairTerms,
        *,
        count: int,
        held_out: int,
        micro: int,
        seed: int,
    ) -> None:
        """Draw `count` pairs per step, and measure at most `held_out` per domain.

        `micro` pairs share a forward pass.

        Raises:
            InputError: the pairs cannot be shared evenly by the processes, or no domain has any.
        """
        if count % processes.world:
            raise InputError(
                f"{count} pairs per step cannot be shared evenly by {processes.world} processes. "
                f"Give --pair-rows a multiple of {2 * processes.world}."
            )
        self.terms, self.processes, self.micro, self.count = terms, processes, micro, count
        self.domains = list(domains)
        self.order = PairOrder(pairs, domains, count, seed, processes.share)
        if not self.order.domains:
            raise InputError(f"{pairs.where} has no training pair of a domain of the run.")
        self.reader = PairReader(pairs, self.order.domains, processes.device)
        self.held_out: dict[str, Ints] = {
            name: sample(name, halved(pairs.extents(name, VALIDATION)), held_out)
            for name in self.order.domains
        }

    def backward(self, model: Callable[..., Any], weights: Floats) -> Learned:
        """Add the gradient of the mean loss of the next pairs under (D) weights.

        `model` is an `Objective`, or its wrapper for several processes.
        """
        draw, mine = self.order.next(weights)
        batch = self.reader.read(TRAIN, mine.domain, mine.row)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.processes.device)
        pieces = list(batch.micro(self.micro))
        for number, piece in enumerate(pieces, 1):
            alone = number < len(pieces)
            with self.processes.accelerator.no_sync(model) if alone else nullcontext():
                found = self.loss(model, piece)
                (found.loss.sum() * (self.processes.world / self.count)).backward()
            sums += summed(found)
        means = (self.processes.total(sums) / self.count).tolist()
        tokens = torch.zeros(len(self.domains), dtype=torch.int64)
        names = [self.domains.index(self.order.domains[number]) for number in mine.domain]
        tokens.index_add_(0, torch.tensor(names), batch.lengths.sum(1).cpu())
        rows = 2 * self.order.counts(draw, len(self.domains))
        return Learned(
            dict(zip(SUMS, means, strict=True)),
            self.processes.total(tokens.to(self.processes.device)).tolist(),
            rows.tolist(),
        )

    def loss(self, model: Callable[..., Any], batch: PairBatch) -> PairLoss:
        """Return the loss of some pairs."""
        tokens, mask = batch.tokens.flatten(0, 1), batch.loss_mask.flatten(0, 1)
        logq = row_sums(model(tokens, mask, None, apart=True), mask).unflatten(0, (-1, 2))
        return self.terms(logq, batch.logp, batch.lengths)

    @torch.no_grad()
    def measure(self, model: Callable[..., Any]) -> MeasuredPairs:
        """Return the means over the held-out pairs of each domain of the run."""
        return {name: self._measured(model, name) for name in self.domains}

    def _measured(self, model: Callable[..., Any], name: str) -> dict[str, float | None]:
        pairs = self.held_out.get(name, np.empty(0, np.int64))
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.processes.device)
        for first in range(0, len(pairs), self.micro)[self.processes.share]:
            chosen = pairs[first : first + self.micro]
            domain = np.full(len(chosen), self.order.domains.index(name))
            for piece in self.reader.read(VALIDATION, domain, chosen).micro(self.micro):
                sums += summed(self.loss(model, piece))
        totals = self.processes.total(sums).tolist()
        means = (total / len(pairs) if len(pairs) else None for total in totals)
        return dict(zip(SUMS, means, strict=True))


def summed(found: PairLoss) -> torch.Tensor:
    """Return the sums over pairs that `SUMS` names, float64."""
    reward_N2 = found.reward.detach()
    margin_N = reward_N2[:, 0] - reward_N2[:, 1]
    parts = (found.loss.detach(), margin_N, margin_N > 0, *reward_N2.T)
    return torch.stack([part.sum(dtype=torch.float64) for part in parts])


def pair_identity(pairs: Cache) -> Mapping[str, Any]:
    """Return what identifies the pairs that a run was trained on."""
    content = {name: pairs.plan(name).content for name in pairs.domains}
    return {"fingerprint": pairs.spec.fingerprint, "content": content}
