"""Every kind of target that is compared, from the same logits: ours, and those of others."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ddk_cache import SparseTargets, TargetSpec
from ddk_cache.build import targets

Targets = SparseTargets[torch.Tensor]
Make = Callable[[torch.Tensor, torch.Tensor], Targets]
"""(P, V) teacher logits and (P) true tokens → (P, K) targets whose ids differ."""


def stored(spec: str) -> Make:
    """Return a kind that a cache can have, before rounding."""
    wanted = TargetSpec.parse(spec)

    def make(logits_PV: torch.Tensor, labels_P: torch.Tensor) -> Targets:
        scores = targets.extract(logits_PV[None], labels_P[None], wanted).targets(wanted.kind)
        return SparseTargets(scores.ids[0], scores.probs[0], scores.tail[0])

    return make


def renormalised(k: int) -> Make:
    """Return the k likeliest alone, scaled to one: what most caches do."""

    def make(logits_PV: torch.Tensor, labels_P: torch.Tensor) -> Targets:
        kept = stored(f"topk:{k}")(logits_PV, labels_P)
        probs = kept.probs / kept.probs.sum(-1, keepdim=True)
        return SparseTargets(kept.ids, probs, torch.zeros_like(kept.tail))

    return make


def rest_on_the_label(k: int) -> Make:
    """Return the k likeliest, with everything else given to the true token (arXiv 2503.16870)."""

    def make(logits_PV: torch.Tensor, labels_P: torch.Tensor) -> Targets:
        kept = stored(f"topk:{k + 1}")(logits_PV, labels_P)
        ids, probs = kept.ids.clone(), kept.probs.clone()
        rest = kept.tail + probs[:, k]
        probs[:, k] = 0.0
        there = ids[:, :k] == labels_P[:, None]
        missing = ~there.any(-1)
        ids[missing, k] = labels_P[missing]
        probs[missing, k] = rest[missing]
        probs[:, :k] += there * rest[:, None]
        return SparseTargets(ids, probs, torch.zeros_like(rest))

    return make


def random_sampling(draws: int) -> Make:
    """Return the shares of ids drawn with replacement (arXiv 2503.16870)."""

    def make(logits_PV: torch.Tensor, labels_P: torch.Tensor) -> Targets:
        parts = []
        for logits in logits_PV.split(256):
            drawn = torch.multinomial(logits.softmax(-1), draws, replacement=True)
            counts = torch.zeros_like(logits).scatter_add_(-1, drawn, torch.ones(drawn.shape))
            parts.append(counts.topk(draws, -1))
        ids = torch.cat([part.indices for part in parts])
        probs = torch.cat([part.values for part in parts]) / draws
        return SparseTargets(ids, probs, torch.zeros(len(ids)))

    return make


OTHERS = {"random": random_sampling, "renormalised": renormalised, "label": rest_on_the_label}
"""What others store, by the word before the colon; topk and sampled are ours."""


def kinds(names: str) -> dict[str, Make]:
    """Return kinds by name, for example of `sampled:16,topk:64,random:50`."""
    found = {}
    for name in names.split(","):
        kind, size = name.split(":")
        found[name] = OTHERS[kind](int(size)) if kind in OTHERS else stored(name)
    return found
