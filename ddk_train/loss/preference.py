"""Losses on pairs of responses to one prompt: the teacher's is to be preferred to the student's.

`dpkd` is DPKD (arXiv 2406.19774, Eq. 9), with the teacher p as the reference of the implicit reward
r(y) = β / |y| · log[q(y)/p(y)] and the loss −log σ(r(y_t) − r(y_s)). `plad` is a ranking loss on
the text alone, max(0, m − r(y_t) + r(y_s)) with r(y) = log q(y) / |y|: the form of SLiC
(arXiv 2305.10425), on which PLaD (arXiv 2406.02886) builds.

In both papers the student answers during training. Here its responses are those of the initial
student, drawn once: the teacher is not needed again, and the pairs grow stale as the student
learns.

Shape letters: N pairs; of the axis of two, the first is the teacher's response.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import softplus


@dataclass(frozen=True)
class PairTerms:
    """Which loss, and its parameters."""

    loss: str = "dpkd"
    beta: float = 0.1
    """β of `dpkd`."""
    margin: float = 1.0
    """m of `plad`, in nats per token."""
    per_token: bool = True
    """Divide the log-probability of a response by its length; without, the longer one counts more.
    DPKD's authors report a lower result without."""

    def __call__(
        self, logq_N2: torch.Tensor, logp_N2: torch.Tensor, length_N2: torch.Tensor
    ) -> PairLoss:
        """Return the loss of N pairs, from log-probabilities (nats) and lengths (tokens).

        `logq` is the student's and `logp` the teacher's, each summed over a response.
        """
        scale = 1 / length_N2 if self.per_token else torch.ones_like(logq_N2)
        return PAIR_LOSSES[self.loss](logq_N2 * scale, logp_N2 * scale, self)


class PairLoss(NamedTuple):
    """What a loss on pairs returns."""

    loss: torch.Tensor
    """(N)"""
    reward: torch.Tensor
    """(N, 2) the implicit reward of each response; their difference is the margin."""


def dpkd(logq_N2: torch.Tensor, logp_N2: torch.Tensor, terms: PairTerms) -> PairLoss:
    """−log σ(r_t − r_s), r = β (log q − log p)."""
    reward_N2 = terms.beta * (logq_N2 - logp_N2)
    return PairLoss(softplus(reward_N2[:, 1] - reward_N2[:, 0]), reward_N2)


def plad(logq_N2: torch.Tensor, logp_N2: torch.Tensor, terms: PairTerms) -> PairLoss:
    """max(0, m − r_t + r_s), r = log q."""
    return PairLoss((terms.margin - logq_N2[:, 0] + logq_N2[:, 1]).clamp(min=0), logq_N2)


PAIR_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, PairTerms], PairLoss]] = {
    "dpkd": dpkd,
    "plad": plad,
}
"""The names that `--pairs` accepts, besides `none`."""
