"""Gaps between student and teacher → sampling weights of the domains. Pure NumPy, in float64.

A rule gives a factor r for each domain; the weights that rows are drawn by are r with a floor, so
that no domain is ever lost sight of. A rule is a function of the gaps, of its own last factor and
of `Settings`, and of nothing else: what a run recorded gives its weights again, to the last bit.

`ddk` is Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models" (NeurIPS
2024, arXiv 2407.16154). Its ratios are of perplexities, which run into the thousands for a fresh
student, so both equations are computed in log space: the softmax then saturates as it should,
where a plain exp would overflow. Nothing is clipped; that would be another rule.

Arrays have one entry for each domain, D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ddk_cache import DDKError, InputError
from ddk_cache.errors import unknown

Floats = npt.NDArray[np.float64]

FLOOR = 1e-4
"""The least weight of a domain is this over D. It is there for rules that saturate, and far below
what any of them gives otherwise: Eq. 2 never comes near it at α < 1."""

MOST_LOSS = 700.0
"""Nats that no finite student reaches; exp of it is still a float64."""

DOREMI_STEP = 1.0
"""Step size η of the exponentiated gradient (Xie et al. 2023, Algorithm 1 and appendix)."""

DOREMI_SMOOTHING = 1e-3
"""Share of the even weights c, likewise."""


@dataclass(frozen=True)
class Gaps:
    """What one measurement found."""

    student_loss: Floats
    """(D) nats a position on held-out rows; NaN where a domain has none."""
    teacher_loss: Floats
    """(D) the same rows under the teacher."""
    sizes: Floats
    """(D) training rows."""

    @property
    def ratio(self) -> Floats:
        """Return (D) perplexity of the student over that of the teacher."""
        return np.exp(self.excess)

    @property
    def excess(self) -> Floats:
        """Return (D) loss of the student above that of the teacher."""
        return self.student_loss - self.teacher_loss


class Settings(NamedTuple):
    """What a rule can be told."""

    alpha: float = 0.5
    """The share of the factor that follows the gaps; the rest is even."""
    given: Floats | None = None
    """(D) the weights of `fixed`."""


class Update(NamedTuple):
    """What a rule makes of a measurement."""

    log_factor: Floats
    """(D) log r, the rule's state."""
    weights: Floats
    """(D) sampling weights from here on; see `floored`."""


Rule = Callable[[Gaps, Floats | None, Settings], Floats]
"""(gaps, log r before or None at the first measurement, settings) → log r after, (D).

The factor r is kept as its logarithm: Eq. 1 on a fresh student gives factors below the smallest
float64, which a later interval must be able to bring back.
"""


def ddk(gaps: Gaps, log_before: Floats | None, settings: Settings) -> Floats:
    """Factor smooth updating.

    At first Eq. 1: r = softmax(ℓ_S / ℓ_T). Then Eq. 2: ψ = r · exp(ℓ_S / ℓ_T) and
    r′ = α ψ / Σψ + (1 − α) / D. Each r′ lies in [(1 − α) / D, α + (1 − α) / D].
    """
    if log_before is None:
        return eq1(gaps, None, settings)
    return mixed(log_softmax(log_before + gaps.ratio), settings.alpha)


def eq1(gaps: Gaps, log_before: Floats | None, settings: Settings) -> Floats:
    """Eq. 1 at every measurement, without smoothing: the paper's ablation."""
    return log_softmax(gaps.ratio)


def doremi(gaps: Gaps, log_before: Floats | None, settings: Settings) -> Floats:
    """Exponentiated gradient on the excess loss (Xie et al. 2023, arXiv 2305.10429, Algorithm 1).

    r′ ∝ r · exp(η · max(L_S − L_T, 0)), then smoothed by c; r is even at first. Two departures: the
    reference is the teacher, and the excess is clipped by domain, not by token, because that is
    what held-out losses give. Its weights are used as they come, not averaged for a second run.
    """
    even = np.full(len(gaps.sizes), -math.log(len(gaps.sizes)))
    before = even if log_before is None else log_before
    risen = log_softmax(before + DOREMI_STEP * np.maximum(gaps.excess, 0))
    return mixed(risen, 1 - DOREMI_SMOOTHING)


def excess(gaps: Gaps, log_before: Floats | None, settings: Settings) -> Floats:
    """In proportion to the loss that is left to lose: r = α e / Σe + (1 − α) / D, our own.

    e = max(L_S − L_T, 0), nats. Where a domain's loss falls like e ∝ n^−b in the tokens n spent on
    it, the next token there gains b·e/n, and no token would do better elsewhere when n ∝ e. Nats
    and not perplexities: a fresh student lags by some nats everywhere, where Eq. 1 puts all on one
    domain; and no memory, so that nothing builds up.
    """
    left = np.maximum(gaps.excess, 0)
    if not left.any():  # better than the teacher everywhere
        return uniform(gaps, log_before, settings)
    with np.errstate(divide="ignore"):
        return mixed(np.log(left / left.sum()), settings.alpha)


def uniform(gaps: Gaps, log_before: Floats | None, settings: Settings) -> Floats:
    """Draw every domain alike."""
    return np.full(len(gaps.sizes), -np.log(len(gaps.sizes)))


def proportional(gaps: Gaps, log_before: Floats | None, settings: Settings) -> Floats:
    """Draw domains in proportion to their training rows: the corpus as it is."""
    shares: Floats = np.log(gaps.sizes / gaps.sizes.sum())
    return shares


def fixed(gaps: Gaps, log_before: Floats | None, settings: Settings) -> Floats:
    """Draw by weights that a person gave."""
    if settings.given is None:
        raise InputError("weighting 'fixed' needs --weights, for example --weights code=2,web=1.")
    logs: Floats = np.log(settings.given)
    return logs


def update(rule: str, gaps: Gaps, log_before: Floats | None, settings: Settings) -> Update:
    """Return the new factor and weights under a named rule.

    A domain without held-out rows is for `check_measured`; a rule that follows nothing draws it.

    Raises:
        DDKError: a held-out loss is not finite.
    """
    needed = np.full(len(gaps.sizes), rule in FOLLOW_GAPS) | ~np.isnan(gaps.teacher_loss)
    if not (gaps.student_loss[needed] < MOST_LOSS).all():
        raise DDKError(
            f"a held-out loss is not finite: {gaps.student_loss.tolist()}. The student is lost; a "
            "lower --lr may help."
        )
    log_factor = RULES[rule](gaps, log_before, settings)
    by_size = rule in BY_SIZE_FIRST and log_before is None
    drawn = proportional(gaps, None, settings) if by_size else log_factor
    return Update(log_factor, floored(drawn))


def check_measured(rule: str, unmeasured: Sequence[str]) -> None:
    """Raise InputError where a rule follows gaps and there are domains without held-out rows."""
    if rule in FOLLOW_GAPS and unmeasured:
        raise InputError(
            f"weighting {rule!r} follows the gap on held-out rows, and these domains have none: "
            f"{', '.join(unmeasured)}. Build the cache with a larger --holdout, or use "
            "--weighting uniform, proportional or fixed."
        )


# --- what rules are made of ---


def log_softmax(logits: Floats) -> Floats:
    """Return x − log Σ exp(x) without overflow."""
    shifted: Floats = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def mixed(log_r: Floats, share: float) -> Floats:
    """Return log(share · r + (1 − share) / D)."""
    with np.errstate(divide="ignore"):  # log 0 = −inf is what shares of 0 and 1 mean
        even = np.log((1 - share) / len(log_r))
        log_mixed: Floats = np.logaddexp(np.log(share) + log_r, even)
    return log_mixed


def floored(log_r: Floats) -> Floats:
    """Return weights of log r that sum to one, none below FLOOR / D by more than FLOOR of it."""
    weights: Floats = np.maximum(np.exp(log_softmax(log_r)), FLOOR / len(log_r))
    weights /= weights.sum()
    return weights


# --- weights that a person gives ---


def parse_weights(text: str) -> dict[str, float]:
    """Read `code=0.5,web=0.3`. Raises InputError where a weight is not a number above 0."""
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not name or name in found or not 0 < weight < math.inf:
            raise InputError(
                f"cannot read the weight {part!r}. Give each domain once, with a number above 0: "
                "--weights code=0.5,web=0.3"
            )
        found[name] = weight
    return found


def given_weights(given: Mapping[str, float], domains: Sequence[str]) -> Floats | None:
    """Return (D) given weights with a sum of one, or None where none are given.

    Raises:
        InputError: they are for other domains than these, or not for all of them.
    """
    if not given:
        return None
    for name in given:
        if name not in domains:
            raise InputError(unknown("domain", name, domains))
    if missing := [name for name in domains if name not in given]:
        raise InputError(
            f"--weights has none for {', '.join(missing)}. Give every domain of the cache one; it "
            "may be small."
        )
    weights = np.array([given[name] for name in domains])
    return np.asarray(weights / weights.sum())


RULES: dict[str, Rule] = {
    "ddk": ddk,
    "doremi": doremi,
    "eq1": eq1,
    "excess": excess,
    "fixed": fixed,
    "proportional": proportional,
    "uniform": uniform,
}
"""Every rule by the name that `--weighting` takes."""

FOLLOW_GAPS = {"ddk", "doremi", "eq1", "excess"}
"""Rules that need held-out rows in every domain."""

BY_SIZE_FIRST = {"ddk", "eq1"}
"""Rules of DDK's Algorithm 1: the first interval is drawn in proportion to size."""
