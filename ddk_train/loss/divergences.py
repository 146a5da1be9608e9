"""Divergences between teacher and student over buckets: the kept ids, and all other ids as one.

The mass that was not kept is one more bucket, so that each divergence is a proper divergence of a
coarse-grained distribution: never negative, and zero only where student and teacher agree on every
kept id and on the rest as a whole. Without that bucket the gradient would raise all kept ids
without end (M·q − t with M < 1; "Sparse Logit Sampling", arXiv 2503.16870).

A divergence returns its value and its slope by the student's log-probabilities of the buckets. The
slopes are written out rather than left to autograd, because the head needs nothing else to compute
the gradient of the logits in one pass. The price is a few lines per divergence, which a test
compares with autograd.

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
"""(P, B) teacher's probabilities t and the student's log-probabilities log q, float32 →
(P) divergence in nats, (P, B) ∂/∂ log q, with every log q independent."""

LEAST = math.log(torch.finfo(torch.float32).tiny)
"""The log-probability of a bucket in which the teacher has no mass; the exact reverse KL there is
infinite."""


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
    """β KL(t ‖ m) + (1 − β) KL(q ‖ m), m = β t + (1 − β) q (generalized; arXiv 2306.13649)."""
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


def dpkd(
    t_PB: torch.Tensor, logq_PB: torch.Tensor, *, beta: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """−log σ(β (log q(y_t)/q(y_s) − log t(y_t)/t(y_s))): DPKD for each token (arXiv 2406.19774).

    y_t is the teacher's and y_s the student's likeliest id, which must be among the kept ids; the
    rest is not an id. Where both agree the loss is log 2, without a gradient.
    """
    y_t, y_s = t_PB[:, :-1].argmax(-1, keepdim=True), logq_PB[:, :-1].argmax(-1, keepdim=True)
    logt_PB = t_PB.log().clamp_min(LEAST)
    of_q_P1 = logq_PB.gather(-1, y_t) - logq_PB.gather(-1, y_s)
    z_P1 = beta * (of_q_P1 - logt_PB.gather(-1, y_t) + logt_PB.gather(-1, y_s))
    slope_P1 = -beta * torch.sigmoid(-z_P1)
    slope_PB = torch.zeros_like(logq_PB).scatter_add_(-1, y_t, slope_P1)
    slope_PB.scatter_add_(-1, y_s, -slope_P1)
    return torch.nn.functional.softplus(-z_P1)[:, 0], slope_PB


def needs_students_likeliest(loss: Divergence) -> bool:
    """Return whether a divergence needs the student's likeliest id among the kept ids."""
    return getattr(loss, "func", loss) is dpkd


def divergence(name: str) -> Divergence:
    """Return the divergence of a name such as `forward_kl` or `jsd:0.5`.

    Raises:
        InputError: the name is unknown, or its parameter is not in (0, 1).
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
            f"loss: got {name!r}, expected a number between 0 and 1, for example {base}:0.1."
        )
    return partial(function, **{parameter: value})


def check_targets(name: str, temperature: float, spec: CacheSpec) -> None:
    """Check that this loss can be computed on the targets of a cache at this temperature.

    Raises:
        InputError: the loss is not defined on these targets.
        MismatchError: the cache does not have the tail at that temperature.
    """
    if spec.targets.kind == "sampled" and name != "forward_kl":
        raise InputError(
            f"loss: got {name!r}, expected forward_kl on sampled targets. Other losses need the "
            "teacher's probabilities at the student's likely ids; a sampled cache stores them only "
            "for drawn ids. Use forward_kl, or a cache with topk targets."
        )
    if temperature != 1:
        spec.temperature_place(temperature)


PLAIN: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "dpkd": dpkd,
}
WITH_PARAMETER: dict[str, tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], str]] = {
    "jsd": (jsd, "beta"),
    "skew_kl": (skew_kl, "alpha"),
    "dpkd": (dpkd, "beta"),
}
LOSSES = (*PLAIN, *(f"{name}:{p.upper()}" for name, (_, p) in WITH_PARAMETER.items()))
"""The names that `--loss` accepts."""
