"""Divergences between teacher and student over buckets: the kept ids, and all the rest as one.

The mass that was not kept is one more bucket, so that each divergence is a proper one of a
coarse-grained distribution: never negative, zero only where student and teacher agree on every
kept id and on the rest as a whole. Without it the gradient would pull all kept ids up for ever
(M·q − t with M < 1; "Sparse Logit Sampling", arXiv 2503.16870).

A divergence gives its value and its slope by the student's log-probabilities of the buckets. The
slopes are written out rather than left to autograd, because they are all that the head needs to
make the gradient by the logits in one pass: a few lines each, and a test holds them to autograd.

Shape letters: P positions, B buckets (K kept ids and the rest).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from ddk_cache import CacheSpec, InputError
from ddk_cache.errors import unknown

Divergence = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(P, B) teacher's probabilities t and log-probabilities of the student log q, float32 →
(P) divergence in nats, (P, B) ∂/∂ log q, each log q taken as free."""

LEAST = math.log(torch.finfo(torch.float32).tiny)
"""The log-probability of a bucket to which the teacher gave nothing; reverse KL there is infinite
in truth."""


def forward_kl(t_PB: torch.Tensor, logq_PB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(t ‖ q) = Σ t log(t/q)."""
    cross_PB = (t_PB * logq_PB).where(t_PB > 0, 0.0)  # 0 · log 0 = 0
    return (torch.xlogy(t_PB, t_PB) - cross_PB).sum(-1), -t_PB


def reverse_kl(t_PB: torch.Tensor, logq_PB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q ‖ t) = Σ q log(q/t)."""
    q_PB = logq_PB.exp()
    ratio_PB = (logq_PB - t_PB.log().clamp_min(LEAST)).where(q_PB > 0, 0.0)
    return (q_PB * ratio_PB).sum(-1), q_PB * (ratio_PB + 1)


def jsd(
    t_PB: torch.Tensor, logq_PB: torch.Tensor, *, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """β KL(t ‖ m) + (1 − β) KL(q ‖ m), m = β t + (1 − β) q (generalised; arXiv 2306.13649)."""
    q_PB = logq_PB.exp()
    logm_PB = torch.log(beta * t_PB + (1 - beta) * q_PB)
    of_t_PB = (t_PB * (t_PB.log() - logm_PB)).where(t_PB > 0, 0.0)
    of_q_PB = (q_PB * (logq_PB - logm_PB)).where(q_PB > 0, 0.0)
    return (beta * of_t_PB + (1 - beta) * of_q_PB).sum(-1), (1 - beta) * of_q_PB


def skew_kl(
    t_PB: torch.Tensor, logq_PB: torch.Tensor, *, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(t ‖ m), m = α t + (1 − α) q (skewed forward KL; arXiv 2402.03898)."""
    rest_PB = (1 - alpha) * logq_PB.exp()
    m_PB = alpha * t_PB + rest_PB
    some_PB = t_PB > 0
    value_P = (t_PB * (t_PB.log() - m_PB.log())).where(some_PB, 0.0).sum(-1)
    return value_P, (-t_PB * rest_PB / m_PB).where(some_PB, 0.0)


def divergence(name: str) -> Divergence:
    """Return the divergence of a name such as `forward_kl` or `jsd:0.5`.

    Raises:
        InputError: there is none of that name, or its parameter does not lie in (0, 1).
    """
    base, _, text = name.partition(":")
    if base in PLAIN and not text:
        return PLAIN[base]
    if base not in WITH_PARAMETER:
        raise InputError(unknown("loss", name, LOSSES))
    function, parameter = WITH_PARAMETER[base]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise InputError(
            f"loss {base!r} takes a number between 0 and 1, for example {base}:0.1, not {name!r}."
        )
    return partial(function, **{parameter: value})


def check_targets(name: str, temperature: float, spec: CacheSpec) -> None:
    """Check that the targets of a cache can give this loss at this temperature.

    Raises:
        InputError: the loss has no meaning on them.
        MismatchError: they do not hold the mass outside at that temperature.
    """
    if spec.targets.kind == "sampled" and name != "forward_kl":
        raise InputError(
            f"loss {name!r} has no meaning on sampled targets: it needs the teacher's probability "
            "of what the student likes, and there an id without one was not drawn, which is not "
            "zero. Use forward_kl, or a cache of topk targets."
        )
    if temperature != 1:
        spec.temperature_place(temperature)


PLAIN: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}
WITH_PARAMETER: dict[str, tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], str]] = {
    "jsd": (jsd, "beta"),
    "skew_kl": (skew_kl, "alpha"),
}
LOSSES = (*PLAIN, *(f"{name}:{p.upper()}" for name, (_, p) in WITH_PARAMETER.items()))
"""Every divergence as `--loss` takes it."""
