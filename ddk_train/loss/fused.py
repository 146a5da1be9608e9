"""The student's output projection fused with its loss, in chunks of positions.

The logits of a chunk are computed, replaced in place by their own gradient, and multiplied into
the gradients of hidden states and head, all in the forward pass: [positions, V] is never in memory,
and there are three matrix products, as for a plain cross-entropy. The price: the weight of the
divergence must be known beforehand, and the backward pass can run only once.

Shape letters: P positions, H hidden, V vocabulary, W with the spare output of a narrow head, K kept
ids, B buckets (K and the rest).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from ddk_cache import SparseTargets
from ddk_train.loss.divergences import Divergence, forward_kl, needs_students_likeliest
from ddk_train.loss.head import Gradients, Head, in_chunks

Targets = SparseTargets[torch.Tensor]


@dataclass(frozen=True)
class Terms:
    """The loss of a position: CE + γ · T² · D(teacher ‖ student, both at temperature T)."""

    gamma: float
    divergence: Divergence = forward_kl
    temperature: float = 1.0
    compiled: bool = False
    """Fuse the passes over a chunk by torch.compile. For CUDA: on a CPU the chunk stays in the CPU
    cache, and the compiled passes took twice as long."""


class Sums(NamedTuple):
    """Sums over positions, in nats."""

    loss: torch.Tensor
    """CE + γ · T² · D; the only sum with a gradient."""
    ce: torch.Tensor
    divergence: torch.Tensor
    """T² · D, without γ."""
    ce_by_position: torch.Tensor
    """(P) the cross-entropy of each position."""


def fused_loss(
    hidden_PH: torch.Tensor,
    head: Head,
    labels_P: torch.Tensor,
    targets: Targets | None,
    terms: Terms,
) -> Sums:
    """Return the loss of hidden states under a head; see `Terms`.

    The ids of a position must be distinct. Without targets the loss is cross-entropy alone.
    Products are computed in the dtype of the hidden states, everything else in float32.
    """
    with torch.autocast(hidden_PH.device.type, enabled=False):
        sums = _Fused.apply(  # type: ignore[no-untyped-call]
            hidden_PH, head.weight, head.bias, head, labels_P, targets, terms
        )
    return Sums(*sums)


def pick(targets: Targets, index: slice | torch.Tensor | tuple[torch.Tensor, ...]) -> Targets:
    """Return the targets of some positions."""
    return targets.map(lambda values: values[index])


def within(targets: Targets, V: int) -> Targets:
    """Return targets for a narrow head of V outputs.

    Two heads over one tokenizer may be padded to different widths. The teacher's mass at ids that
    the student does not have moves to the tail; the spare output V takes their place.
    """
    beyond = targets.ids >= V
    tail = targets.tail + (targets.probs * beyond).sum(-1)
    ids, probs = targets.ids.masked_fill(beyond, V), targets.probs.masked_fill(beyond, 0.0)
    return SparseTargets(ids, probs, tail)


@torch.no_grad()
def measure(
    hidden_PH: torch.Tensor, head: Head, labels_P: torch.Tensor, targets: Targets
) -> torch.Tensor:
    """Return cross-entropy and KL(teacher ‖ student) of each position, nats; (2, P) float32.

    There is no gradient, T is 1, and the divergence is the same for every run.
    """
    values = hidden_PH.new_empty((2, len(hidden_PH)), dtype=torch.float32)
    with torch.autocast(hidden_PH.device.type, enabled=False):
        head = head.like(hidden_PH.dtype)
        for part, logits_PV in in_chunks(hidden_PH, head):
            label_P1 = logits_PV.gather(-1, labels_P[part, None])
            kept = pick(targets, part)
            t_PB = torch.cat([kept.probs, kept.tail[:, None]], -1)
            logq_PB, norm_P1, _ = buckets_(logits_PV, kept.ids)
            kl_P, _ = forward_kl(t_PB, logq_PB)
            values[0, part], values[1, part] = (norm_P1 - label_P1)[:, 0], kl_P
    return values


class _Fused(torch.autograd.Function):
    """Loss and gradients in one pass; the gradients are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PH: torch.Tensor,
        weight_VH: torch.Tensor | None,
        bias_V: torch.Tensor | None,
        head: Head,
        labels_P: torch.Tensor,
        targets: Targets | None,
        terms: Terms,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        sums = hidden_PH.new_zeros(2, dtype=torch.float64)
        all_ce_P = hidden_PH.new_empty(len(hidden_PH), dtype=torch.float32)
        turn_into_gradient = compiled_gradient() if terms.compiled else gradient_
        gradients = Gradients(hidden_PH, head, ctx.needs_input_grad)
        for part, logits_PW in gradients.from_chunks():
            kept = targets and pick(targets, part)
            ce_P, divergence_P = turn_into_gradient(logits_PW, labels_P[part], kept, terms)
            sums += torch.stack([ce_P.sum(), divergence_P.sum()])
            all_ce_P[part] = ce_P
        ctx.gradients = gradients.tensors
        ce, divergence = sums.float()
        ctx.mark_non_differentiable(ce, divergence, all_ce_P)
        return ce + terms.gamma * divergence, ce, divergence, all_ce_P

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients in place; they are used only once."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of the fused loss can be computed only once")
        return *(g if g is None else g.mul_(grads[0]) for g in gradients), None, None, None, None


def gradient_(
    logits_PV: torch.Tensor, labels_P: torch.Tensor, targets: Targets | None, terms: Terms
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrite float32 logits by the gradient of their loss; return CE and T² · D (P), in nats.

    At T = 1 cross-entropy and divergence share one pass; at another they need one each.
    """
    T = terms.temperature
    if targets and needs_students_likeliest(terms.divergence):
        targets = with_likeliest(logits_PV, targets)
    label_P1 = logits_PV.gather(-1, labels_P[:, None])
    divergence_P = torch.zeros_like(label_P1[:, 0])
    if targets is None:
        norm_P1 = softmax_(logits_PV)
    elif T == 1:
        norm_P1, divergence_P = divergence_(logits_PV, targets, terms.divergence, terms.gamma, 1.0)
    else:
        soft_PV = logits_PV / T
        _, divergence_P = divergence_(soft_PV, targets, terms.divergence, terms.gamma * T, 0.0)
        divergence_P *= T**2
        norm_P1 = softmax_(logits_PV)
        logits_PV += soft_PV
    logits_PV.scatter_add_(-1, labels_P[:, None], torch.full_like(label_P1, -1.0))
    return (norm_P1 - label_P1)[:, 0], divergence_P


def with_likeliest(logits_PV: torch.Tensor, targets: Targets) -> Targets:
    """Return targets that have the student's likeliest id too, with an even share of the tail.

    That share is the tail divided by the number of ids that were not kept; the tail loses it.
    """
    likeliest_P1 = logits_PV.argmax(-1, keepdim=True)
    known_P1 = (targets.ids == likeliest_P1).any(-1, keepdim=True)
    others_P1 = logits_PV.shape[-1] - (targets.ids >= 0).sum(-1, keepdim=True)
    share_P1 = (targets.tail[:, None] / others_P1.clamp_min(1)).masked_fill(known_P1, 0.0)
    return SparseTargets(
        torch.cat([targets.ids, likeliest_P1.masked_fill(known_P1, -1)], -1),
        torch.cat([targets.probs, share_P1], -1),
        targets.tail - share_P1[:, 0],
    )


@cache
def compiled_gradient() -> Any:
    """Return `gradient_`, compiled once for any number of positions."""
    return torch.compile(gradient_, dynamic=True)


def softmax_(logits_PV: torch.Tensor) -> torch.Tensor:
    """Overwrite logits by their softmax; return the log of its normalizer (P, 1)."""
    top_P1 = logits_PV.amax(-1, keepdim=True)
    sum_P1 = logits_PV.sub_(top_P1).exp_().sum(-1, keepdim=True)
    logits_PV.div_(sum_P1)
    return top_P1 + sum_P1.log()


def divergence_(
    logits_PV: torch.Tensor, targets: Targets, divergence: Divergence, weight: float, of_q: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrite logits by weight · ∂D/∂logits + of_q · q; return log normalizer (P, 1) and D (P).

    With a the slope of D by log q of a kept id, b that of the rest, and s the sum of all, the
    gradient is a − s·q at kept ids and (b/(1 − Q) − s)·q at the others.
    """
    logq_PB, norm_P1, sum_P1 = buckets_(logits_PV, targets.ids)
    t_PB = torch.cat([targets.probs, targets.tail[:, None]], -1)
    value_P, slope_PB = divergence(t_PB, logq_PB)
    slope_PB = weight * slope_PB
    gradient_PB = slope_PB + (of_q - slope_PB.sum(-1, keepdim=True)) * logq_PB.exp()
    logits_PV.mul_(gradient_PB[:, -1:] / sum_P1.clamp_min(1.0))
    # Added, not written: padding adds nothing to the entry that it stands for.
    logits_PV.scatter_add_(-1, first(targets.ids), gradient_PB[:, :-1])
    return norm_P1, value_P


def first(ids_PK: torch.Tensor) -> torch.Tensor:
    """Return ids that can be looked up: padding (−1) repeats the first entry."""
    return ids_PK.where(ids_PK >= 0, ids_PK[:, :1])


def buckets_(
    logits_PV: torch.Tensor, ids_PK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log q of kept ids and rest (P, B), log normalizer (P, 1), and the rest's sum (P, 1).

    The sum outside the kept ids is computed directly, relative to its own largest term, rather than
    as 1 − Q: no cancellation where the student is confident, and no clamp. The logits are
    overwritten by the terms of that sum, with 0 at kept ids.
    """
    kept_PK = logits_PV.gather(-1, first(ids_PK)).masked_fill_(ids_PK < 0, -torch.inf)
    logits_PV.scatter_(-1, first(ids_PK), -torch.inf)
    top_P1 = logits_PV.amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
    # The largest outside becomes exp(0): the sum is at least 1, or there is nothing outside.
    sum_P1 = logits_PV.sub_(top_P1).exp_().sum(-1, keepdim=True)
    logq_PB = torch.cat([kept_PK, top_P1 + sum_P1.log()], -1)
    norm_P1 = logq_PB.logsumexp(-1, keepdim=True)
    return logq_PB.sub_(norm_P1), norm_P1, sum_P1
