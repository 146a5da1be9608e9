"""Next-token logits → sparse targets, on the teacher's device and in bounded memory.

Positions are taken in chunks, so that no float32 copy of all logits ever exists: besides the
teacher's own output the extraction needs a few `CHUNK_BYTES`, whatever the vocabulary. Where the
head is apart from the teacher, its logits exist in chunks too. Kept log-probabilities are those of
the full vocabulary, never renormalized.

There are two kinds. `topk` keeps the k likeliest ids: easy to understand and biased, since of the
ids outside only the total mass is known. `sampled` is unbiased: ids above a threshold c are kept
exactly, and from all others a systematic sample is drawn, each with probability t/c and counted as
c. Of all unbiased choices of as many entries this has the least variance ("threshold" or
"priority" sampling; Duffield, Lund and Thorup 2007; drawn as by Madow 1949). All positions have the
same threshold, 1/B, so a position gets as many entries as it needs, and B at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ddk_cache.format.spec import TargetSpec
from ddk_cache.types import SparseTargets

CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**28}
"""Size of the float32 working copy of one chunk of positions: on a CPU it must stay in cache (2 MiB
gave twice the speed of 64 MiB), on a GPU it must fill the device."""

HEAD_BYTES = {"cpu": 2**25, "cuda": 2**28}
"""Size of the float32 logits of one chunk of positions that a head is applied to."""

HEAD_POSITIONS = 512
"""Fewest positions of such a chunk: each one reads the whole weight of the head once."""

GROUP = 128
"""Neighboring ids whose mass is summed before a draw searches for its id among them."""

NEGLIGIBLE = 1e-6
"""Mass, in units of the threshold, that is not worth an entry: where a teacher is all but certain,
an entry for it would cost bytes and change nothing."""


class Scores(NamedTuple):
    """The teacher's output at P positions, log-probabilities in nats, named as it is stored."""

    ids: torch.Tensor
    """(P, K) int64, the likeliest first, then drawn ones in order of id; then −1, where a position
    needs fewer than K."""
    logprobs: torch.Tensor
    """(P, K) float32; −inf where an entry was drawn, since those share the tail equally, and where
    there is none."""
    tail_logprob: torch.Tensor
    """(P) float32 log-mass of all ids that are not kept as they are; −inf where there are none."""
    label_logprob: torch.Tensor
    """(P) float32 log-probability of the true next token, kept or not."""
    tempered_tail_logprob: torch.Tensor
    """(P, T) float32 log-mass of all ids that are not kept, at each declared temperature."""

    def targets(self, kind: str) -> SparseTargets[torch.Tensor]:
        """Return the targets as a reader of the cache gets them, before rounding."""
        probs, tail = self.logprobs.exp(), self.tail_logprob.exp()
        if kind == "sampled":
            drawn = torch.isneginf(self.logprobs) & (self.ids >= 0)
            share = tail / drawn.sum(-1).clamp(min=1)
            probs, tail = probs.where(~drawn, share[..., None]), torch.zeros_like(tail)
        return SparseTargets(self.ids, probs, tail)


def extract(
    logits_BSV: torch.Tensor,
    labels_BS: torch.Tensor,
    targets: TargetSpec,
    *,
    temperatures: tuple[float, ...] = (),
    offsets_BS: torch.Tensor | None = None,
) -> Scores:
    """Return the scores of all positions, each field with leading axes (B, S).

    `temperatures` are those at which the mass outside of top-k targets is computed too.
    `offsets_BS` are the uniform numbers in [0, 1) that decide what is drawn; without them each
    call draws anew.
    """
    B, S, V = logits_BSV.shape
    chunk_bytes = CHUNK_BYTES.get(logits_BSV.device.type, CHUNK_BYTES["cuda"])
    # A draw looks at a group for each entry, in float64: with few ids that is more than the logits.
    searched = 2 * GROUP * targets.size if targets.kind == "sampled" else 0
    positions = max(1, chunk_bytes // (4 * max(V, searched)))
    if offsets_BS is None:
        offsets_BS = torch.rand(B, S, dtype=torch.float64, device=logits_BSV.device)
    flat = (logits_BSV.reshape(-1, V), labels_BS.reshape(-1), offsets_BS.reshape(-1))
    chunks = []
    for logits, labels, offsets in zip(*(part.split(positions) for part in flat), strict=True):
        if targets.kind == "sampled":
            chunks.append(sampled(logits.float(), labels, offsets, targets.size))
        else:
            chunks.append(
                topk(logits.float(), labels, targets.size, temperatures, targets.kept_mass)
            )
    return Scores(*(torch.cat(part).unflatten(0, (B, S)) for part in zip(*chunks, strict=True)))


def extract_hidden(
    hidden_BSH: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    labels_BS: torch.Tensor,
    targets: TargetSpec,
    *,
    vocab_size: int,
    temperatures: tuple[float, ...] = (),
    offsets_BS: torch.Tensor,
) -> Scores:
    """Return the scores of all positions as `extract` does, from hidden states.

    `head` makes (P, V) logits of (P, H) hidden states; those of one chunk exist at a time.
    """
    chunk_bytes = HEAD_BYTES.get(hidden_BSH.device.type, HEAD_BYTES["cuda"])
    positions = max(HEAD_POSITIONS, chunk_bytes // (4 * vocab_size))
    flat = (part.flatten(0, 1).split(positions) for part in (hidden_BSH, labels_BS, offsets_BS))

    def one(hidden_PH: torch.Tensor, labels_P: torch.Tensor, offsets_P: torch.Tensor) -> Scores:
        logits_PV = head(hidden_PH)  # freed on return, before the next chunk
        labels_1P, offsets_1P = (part[None].to(logits_PV.device) for part in (labels_P, offsets_P))
        return extract(
            logits_PV[None],
            labels_1P,
            targets,
            temperatures=temperatures,
            offsets_BS=offsets_1P,
        )

    chunks = [one(*parts) for parts in zip(*flat, strict=True)]
    joined = (torch.cat(part, 1)[0] for part in zip(*chunks, strict=True))
    return Scores(*(part.unflatten(0, labels_BS.shape) for part in joined))


def topk(
    logits_PV: torch.Tensor,
    labels_P: torch.Tensor,
    k: int,
    temperatures: tuple[float, ...] = (),
    kept_mass: float = 1.0,
) -> Scores:
    """Keep the k likeliest ids, or the fewest that have a mass of `kept_mass` < 1.

    The mass outside is summed over the ids outside instead of taken as 1 − Σ, which would lose it
    to cancellation where the teacher is confident.
    """
    kept_PK, ids_PK = largest(logits_PV, k)
    logprobs_PK, label_P, probs_PV = _normalized(logits_PV, labels_P, kept_PK, ids_PK)
    probs_PK = logprobs_PK.exp().double()
    enough = kept_mass if kept_mass < 1 else math.inf  # rounded, a sum may reach one too early
    # NaN is kept: the audit refuses it by name.
    needed_PK = ~((probs_PK.cumsum(-1) - probs_PK >= enough) | (probs_PK == 0))
    # Padding repeats the first id, so that nothing outside is touched.
    kept_ids_PK = ids_PK.where(needed_PK, ids_PK[:, :1])
    tail_P = probs_PV.scatter_(-1, kept_ids_PK, 0.0).sum(-1).log()
    tempered = [_outside(logits_PV, kept_ids_PK, temperature) for temperature in temperatures]
    tempered_PT = torch.stack(tempered, -1) if tempered else tail_P.new_empty(len(tail_P), 0)
    return Scores(
        ids_PK.where(needed_PK, -1),
        logprobs_PK.where(needed_PK, -torch.inf),
        tail_P,
        label_P,
        tempered_PT,
    )


def sampled(
    logits_PV: torch.Tensor, labels_P: torch.Tensor, offsets_P: torch.Tensor, size: int
) -> Scores:
    """Keep an unbiased sample: the fewest ids of which each drawn one counts at most 1 / size.

    With n entries of which the h likeliest are the head, each drawn entry counts
    c(n) = (1 − Σ head) / (n − h). A threshold c needs Σ min(1, t / c) entries, so the least n with
    c(n) ≤ 1 / size is that sum at c = 1 / size, rounded up. The head then ends before the first id
    below c(n); the likeliest id is always in it. One threshold for all positions gives the least
    total error for a given number of entries.
    """
    kept_PB, ids_PB = largest(logits_PV, size)
    logprobs_PB, label_P, probs_PV = _normalized(logits_PV, labels_P, kept_PB, ids_PB)
    order_B = torch.arange(size, device=ids_PB.device)
    probs_PB = probs_PV.gather(-1, ids_PB).double()
    outside_P = probs_PV.scatter_(-1, ids_PB, 0.0).sum(-1, dtype=torch.float64)
    # Mass of everything from the b-th likeliest on, added up from its small end.
    rest_PB = probs_PB.flip(-1).cumsum(-1).flip(-1) + outside_P[:, None]
    count_P = entries(probs_PB, rest_PB, size)
    left_PB = count_P[:, None] - order_B
    below_PB = (probs_PB * left_PB < rest_PB - NEGLIGIBLE / size) | (left_PB <= 0)
    head_P = torch.where(below_PB.any(-1), below_PB.int().argmax(-1), size).clamp(min=1)
    head_PB = order_B < head_P[:, None]
    probs_PV.scatter_(-1, ids_PB, probs_PB.where(~head_PB, 0.0).float())
    drawn_PB, tail_P = draw(probs_PV, count_P - head_P, size, offsets_P)
    # The first of the drawn ids go where the head ends.
    place_PB = (order_B - head_P[:, None]).clamp(min=0)
    ids_PB = ids_PB.where(head_PB, drawn_PB.gather(-1, place_PB)).where(left_PB > 0, -1)
    logprobs_PB = logprobs_PB.where(head_PB, -torch.inf)
    tail_P = tail_P.where(head_P < count_P, 0.0).log().float()
    return Scores(ids_PB, logprobs_PB, tail_P, label_P, tail_P.new_empty(len(tail_P), 0))


def entries(probs_PB: torch.Tensor, rest_PB: torch.Tensor, size: int) -> torch.Tensor:
    """Return (P) the entries that a threshold of 1 / size needs, from 1 to size.

    `probs_PB` are the `size` likeliest, `rest_PB` the mass of each and of everything after it.
    """
    large_P = (probs_PB * size >= 1).sum(-1)
    rest_P = torch.cat([rest_PB, torch.zeros_like(rest_PB[:, :1])], -1).gather(-1, large_P[:, None])
    needed_P = (large_P + size * rest_P[:, 0] - NEGLIGIBLE).ceil().long()
    return needed_P.clamp(1, size)


def draw(
    mass_PV: torch.Tensor, count_P: torch.Tensor, most: int, offsets_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `count_P` ids per position, each with probability mass / (total / count).

    Systematic sampling: `count_P` points at equal distances on the cumulative mass. No id is drawn
    twice where none has more than 1 / count of the mass. The points are searched among the sums of
    `GROUP` ids first, so the mass is read once.

    Returns:
        (P, most) ids in order, of which the first `count_P` are drawn, and (P) float64 total mass.
    """
    P, V = mass_PV.shape
    groups = -(-V // GROUP)
    if V % GROUP:
        mass_PV = torch.nn.functional.pad(mass_PV, (0, groups * GROUP - V))
    mass_PGN = mass_PV.view(P, groups, GROUP)
    # In float64: by the rounding of float32 sums a point could meet an id that it had met before.
    sums_PG = mass_PGN.sum(-1, dtype=torch.float64)
    ends_PG = sums_PG.cumsum(-1)
    total_P = ends_PG[:, -1]
    step_P = total_P / count_P.clamp(min=1)
    points_PB = (offsets_P[:, None].double() + torch.arange(most, device=mass_PV.device)) * (
        step_P[:, None]
    )
    group_PB = torch.searchsorted(ends_PG, points_PB, right=True).clamp(max=groups - 1)
    before_PB = ends_PG.gather(-1, group_PB) - sums_PG.gather(-1, group_PB)
    inside_PBN = mass_PGN.gather(1, group_PB[..., None].expand(-1, -1, GROUP)).double().cumsum(-1)
    # A point that rounding put before its group must not meet an id without mass there.
    ahead_PB = (points_PB - before_PB).clamp(min=0)
    within_PB = torch.searchsorted(inside_PBN, ahead_PB[..., None], right=True)
    # A point that rounding put after the last mass of its group belongs to that last mass.
    last_PB = (inside_PBN < inside_PBN[..., -1:]).sum(-1)
    return group_PB * GROUP + torch.minimum(within_PB[..., 0], last_PB), total_P


def largest(logits_PV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest logits and their ids, descending.

    The k largest lie in the k groups with the largest maxima, so only those are searched: about
    half the time of a plain top-k over all ids.
    """
    P, V = logits_PV.shape
    size = max(1, round(math.sqrt(V / k) / 2))  # ids in a group
    groups = V // size
    if groups <= k:
        found = logits_PV.topk(k, -1)
        return found.values, found.indices
    maxima_PG = logits_PV[:, : size * groups].unflatten(1, (size, groups)).amax(1)
    chosen_PK = maxima_PG.topk(k, -1, sorted=False).indices
    places = torch.arange(0, size * groups, groups, device=logits_PV.device)
    rest = torch.arange(size * groups, V, device=logits_PV.device)
    ids = torch.cat([(chosen_PK[:, None] + places[:, None]).flatten(1), rest.expand(P, -1)], 1)
    found = logits_PV.gather(-1, ids).topk(k, -1)
    return found.values, ids.gather(-1, found.indices)


def _normalized(
    logits_PV: torch.Tensor, labels_P: torch.Tensor, kept_PK: torch.Tensor, ids_PK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probabilities of the kept ids and of the labels, and all probabilities."""
    probs_PV = logits_PV.softmax(-1)
    first_P1 = kept_PK[:, :1] - probs_PV.gather(-1, ids_PK[:, :1]).log()
    label_P = logits_PV.gather(-1, labels_P[:, None]) - first_P1
    return kept_PK - first_P1, label_P[:, 0], probs_PV


def _outside(logits_PV: torch.Tensor, ids_PK: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return (P) log-mass of all other ids, at a temperature."""
    probs_PV = (logits_PV / temperature).softmax(-1)
    return probs_PV.scatter_(-1, ids_PK, 0.0).sum(-1).log()
