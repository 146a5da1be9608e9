"""The rules: gaps between student and teacher → factors and sampling weights of the domains.

A rule gives a factor r per domain; rows are drawn by r with a floor, so that every domain is
sampled now and then. A rule is a function of the gaps, of what it remembers (`Before`) and of
`Settings` alone, so a run's recorded measurements reproduce its weights bit for bit.
`ddk_train.weights.moving` keeps what a rule remembers.

`ddk` is Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models" (NeurIPS
2024, arXiv 2407.16154). Its ratios are of perplexities, which run into the thousands for a fresh
student, so both equations are computed in log space: the softmax then saturates as it should,
where a plain exp would overflow. Nothing is clipped; that would be another rule.

Arrays have one entry per domain, D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ddk_cache import DDKError, InputError
from ddk_train.weights.factors import by_share, even, floored, log_softmax, mixed
from ddk_train.weights.gain import gain, reducible
from ddk_train.weights.gaps import Before, Floats, Gaps, Settings

MOST_LOSS = 700.0
"""A loss in nats above that of any student that still learns; its exp is still a float64."""

DOREMI_STEP = 1.0
"""Step size η of the exponentiated gradient (Xie et al. 2023, Algorithm 1 and appendix)."""

DOREMI_SMOOTHING = 1e-3
"""Share c of the even weights, from the same source."""


class Update(NamedTuple):
    """The result of a measurement under a rule."""

    log_factor: Floats
    """(D) log r, the rule's state."""
    weights: Floats
    """(D) sampling weights until the next measurement; see `floored`."""


Rule = Callable[[Gaps, Before, Settings], Floats]
"""(gaps, what came before, settings) → log r, (D)."""


def ddk(gaps: Gaps, before: Before, settings: Settings) -> Floats:
    """Factor smooth updating.

    At first Eq. 1: r = softmax(ℓ_S / ℓ_T). Then Eq. 2: ψ = r · exp(ℓ_S / ℓ_T) and
    r′ = α ψ / Σψ + (1 − α) / D. Each r′ lies in [(1 − α) / D, α + (1 − α) / D].
    """
    if before.log_factor is None:
        return eq1(gaps, before, settings)
    return mixed(log_softmax(before.log_factor + gaps.ratio), settings.alpha)


def eq1(gaps: Gaps, before: Before, settings: Settings) -> Floats:
    """Eq. 1 at every measurement, without smoothing: the paper's ablation."""
    return log_softmax(gaps.ratio)


def doremi(gaps: Gaps, before: Before, settings: Settings) -> Floats:
    """Exponentiated gradient on the excess loss (Xie et al. 2023, arXiv 2305.10429, Algorithm 1).

    r′ ∝ r · exp(η · max(L_S − L_T, 0)), then smoothed by c; r is even at first. Two departures: the
    reference is the teacher, and the excess is clipped by domain, not by token, because that is
    what held-out losses give. Its weights are used as they come, not averaged for a second run.
    """
    log_r = even(len(gaps.sizes)) if before.log_factor is None else before.log_factor
    risen = log_softmax(log_r + DOREMI_STEP * np.maximum(gaps.excess, 0))
    return mixed(risen, 1 - DOREMI_SMOOTHING)


def excess(gaps: Gaps, before: Before, settings: Settings) -> Floats:
    """In proportion to the excess loss: r = α e / Σe + (1 − α) / D; a rule of this project.

    e = max(L_S − L_T, 0), nats. Where a domain's loss falls like e ∝ n^−b in the tokens n spent on
    it, the next token there gains b·e/n, and no token would gain more elsewhere when n ∝ e. It
    uses nats rather than perplexities, since a fresh student lags by some nats in every domain,
    where Eq. 1 puts all weight on one; and it has no memory, so that nothing accumulates.
    `Settings` may tilt e, or let it count less where rows are repeated; see `reducible`.
    """
    left = reducible(gaps, settings)
    if not left.any():  # the student is better than the teacher in every domain
        return uniform(gaps, before, settings)
    return mixed(by_share(left / left.sum()), settings.alpha)


def uniform(gaps: Gaps, before: Before, settings: Settings) -> Floats:
    """Draw all domains equally often."""
    return even(len(gaps.sizes))


def proportional(gaps: Gaps, before: Before, settings: Settings) -> Floats:
    """Draw domains in proportion to their training rows: the corpus as it is."""
    shares: Floats = np.log(gaps.sizes / gaps.sizes.sum())
    return shares


def fixed(gaps: Gaps, before: Before, settings: Settings) -> Floats:
    """Draw by given weights."""
    if settings.given is None:
        raise InputError("weighting 'fixed' needs --weights, for example --weights code=2,web=1.")
    logs: Floats = np.log(settings.given)
    return logs


def update(
    rule: str,
    gaps: Gaps,
    log_before: Floats | None,
    settings: Settings,
    past: Sequence[Gaps] = (),
) -> Update:
    """Return the new factor and weights under a named rule.

    `log_before` is the factor of the measurement before, `past` the measurements before; only
    `gain` uses them. Rules that do not follow gaps accept domains without a loss.

    Raises:
        DDKError: a held-out loss is not finite.
        InputError: the rule needs what the measurement does not have.
    """
    needed = np.full(len(gaps.sizes), rule in FOLLOW_GAPS) | ~np.isnan(gaps.teacher_loss)
    if not (gaps.student_loss[needed] < MOST_LOSS).all():
        raise DDKError(
            f"a held-out loss is not finite: got {gaps.student_loss.tolist()} nats. Training "
            "diverged. Use a lower --lr, with a new run directory."
        )
    before = Before(log_before, past)
    log_factor = RULES[rule](gaps, before, settings)
    by_size = rule in BY_SIZE_FIRST and log_before is None
    drawn = proportional(gaps, before, settings) if by_size else log_factor
    return Update(log_factor, floored(drawn))


RULES: dict[str, Rule] = {
    "ddk": ddk,
    "doremi": doremi,
    "eq1": eq1,
    "excess": excess,
    "fixed": fixed,
    "gain": gain,
    "proportional": proportional,
    "uniform": uniform,
}
"""All rules, by the names that `--weighting` takes."""

FOLLOW_GAPS = {"ddk", "doremi", "eq1", "excess", "gain"}
"""Rules that need the gap of every domain."""

ALPHA = {"gain": 0.75}
"""The share α of rules for which it is not 0.5."""

BY_SIZE_FIRST = {"ddk", "eq1"}
"""Rules of DDK's Algorithm 1: the first interval is drawn in proportion to size."""
