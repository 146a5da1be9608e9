"""Next-token logits → sparse targets, on the teacher's device and in bounded memory.

Positions are taken in chunks, so that no float32 copy of all logits ever exists: beside the
teacher's own output the extraction needs `CHUNK_BYTES`, whatever the vocabulary. What is kept are
log-probabilities of the full vocabulary, never renormalised and never at a temperature: those
are choices of a later training run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ddk_cache.schema import TargetSpec

CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**28}
"""Size of the float32 working copy of one chunk of positions: on a CPU it has to stay in cache
(2 MiB gave twice the speed of 64 MiB), on a GPU it has to fill the device."""


class Scores(NamedTuple):
    """The teacher's word on P positions, log-probabilities in nats."""

    ids: torch.Tensor
    """(P, K) int64, the likeliest first."""
    logprobs: torch.Tensor
    """(P, K) float32"""
    tail: torch.Tensor
    """(P) float32 log-mass of all other ids; −inf where there are none."""
    label: torch.Tensor
    """(P) float32 log-probability of the true next token, kept or not."""


def extract(logits_BSV: torch.Tensor, labels_BS: torch.Tensor, targets: TargetSpec) -> Scores:
    """Return the scores of all positions, each field with leading axes (B, S)."""
    B, S, V = logits_BSV.shape
    logits_PV, labels_P = logits_BSV.reshape(-1, V), labels_BS.reshape(-1)
    chunk_bytes = CHUNK_BYTES.get(logits_BSV.device.type, CHUNK_BYTES["cuda"])
    positions = max(1, chunk_bytes // (4 * V))
    take = KINDS[targets.kind]
    chunks = [
        take(logits.to(torch.float32, copy=True), labels, targets.size)
        for logits, labels in zip(
            logits_PV.split(positions), labels_P.split(positions), strict=True
        )
    ]
    return Scores(*(torch.cat(part).unflatten(0, (B, S)) for part in zip(*chunks, strict=True)))


def topk(logits_PV: torch.Tensor, labels_P: torch.Tensor, k: int) -> Scores:
    """Keep the k likeliest ids. `logits_PV` float32 is used up.

    The mass outside is summed directly over the logits outside instead of taken as 1 − Σ, which
    would lose it to cancellation just where the teacher is sure.
    """
    label_P = logits_PV.gather(-1, labels_P[:, None])[:, 0]
    kept_PK, ids_PK = logits_PV.topk(k, dim=-1)
    outside_P = logits_PV.scatter_(-1, ids_PK, -torch.inf).logsumexp(-1)
    norm_P = torch.logaddexp(kept_PK.logsumexp(-1), outside_P)
    return Scores(ids_PK, kept_PK - norm_P[:, None], outside_P - norm_P, label_P - norm_P)


KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], Scores]] = {"topk": topk}
