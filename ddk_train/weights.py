"""Gaps between student and teacher → sampling weights of the domains, in float64 NumPy.

`DomainWeights` is the part to use: it holds a rule and its state, and turns each measurement into
new weights. Below it, a rule gives a factor r per domain; rows are drawn by r with a floor, so that
every domain is sampled now and then. A rule is a function of the gaps, of its own last factor and
of `Settings` alone, so a run's recorded losses reproduce its weights bit for bit.

`ddk` is Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models" (NeurIPS
2024, arXiv 2407.16154). Its ratios are of perplexities, which run into the thousands for a fresh
student, so both equations are computed in log space: the softmax then saturates as it should,
where a plain exp would overflow. Nothing is clipped; that would be another rule.

Arrays have one entry per domain, D.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ddk_cache import DDKError, InputError
from ddk_cache.errors import unknown

Floats = npt.NDArray[np.float64]

NUMBER = r"[0-9]+\.?[0-9]*([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?"
"""A number as people write it; `float` alone would also accept 1_0 and the digits of any script."""

FLOOR = 1e-4
"""The smallest weight of a domain is this over D. It matters only for rules that saturate: Eq. 2
stays far above it at α < 1."""

MOST_LOSS = 700.0
"""A loss in nats above that of any student that still learns; its exp is still a float64."""

DOREMI_STEP = 1.0
"""Step size η of the exponentiated gradient (Xie et al. 2023, Algorithm 1 and appendix)."""

DOREMI_SMOOTHING = 1e-3
"""Share c of the even weights, from the same source."""


@dataclass(frozen=True)
class Gaps:
    """What one measurement found."""

    student_loss: Floats
    """(D) nats per position on held-out rows; NaN where a domain has none."""
    teacher_loss: Floats
    """(D) the teacher's loss on the same rows."""
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
    """The parameters of a rule."""

    alpha: float = 0.5
    """The share of the factor that follows the gaps; the rest is even."""
    given: Floats | None = None
    """(D) the weights of rule `fixed`."""


class Update(NamedTuple):
    """The result of a measurement under a rule."""

    log_factor: Floats
    """(D) log r, the rule's state."""
    weights: Floats
    """(D) sampling weights until the next measurement; see `floored`."""


class DomainWeights:
    """Sampling weights of domains that follow their measured gaps under a named rule.

    >>> weights = DomainWeights("excess", ["code", "web"], alpha=0.5)
    >>> weights.update(Gaps(student_loss, teacher_loss, sizes))
    array([0.61, 0.39])
    """

    def __init__(
        self,
        rule: str,
        domains: Sequence[str],
        *,
        alpha: float = 0.5,
        given: Mapping[str, float] | None = None,
    ) -> None:
        """Begin with even weights; `given` are the weights of rule `fixed`, by domain.

        Raises:
            InputError: the rule is unknown, or `given` does not fit the rule or the domains.
        """
        if rule not in RULES:
            raise InputError(unknown("weighting", rule, RULES))
        if (rule == "fixed") != bool(given):
            raise InputError("weights and rule 'fixed' belong together: give both or neither.")
        self.rule, self.domains = rule, list(domains)
        self.settings = Settings(alpha, given_weights(given or {}, self.domains))
        self.log_factor: Floats | None = None
        """(D) log r, the rule's state; None before the first measurement."""
        self.weights: Floats = np.full(len(self.domains), 1 / len(self.domains))
        """(D) sampling weights in the order of `domains`, with a sum of one."""

    def update(self, gaps: Gaps) -> Floats:
        """Return the (D) weights after a measurement, and keep them as `weights`.

        Raises:
            DDKError: a held-out loss is not finite.
        """
        self.log_factor, self.weights = update(self.rule, gaps, self.log_factor, self.settings)
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values; floats are hexadecimal, so that they are exact."""
        factor = None if self.log_factor is None else exact(self.log_factor)
        return {"domains": self.domains, "log_factor": factor, "weights": exact(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; one of other domains says nothing about these and is left out."""
        if state["domains"] == self.domains:
            factor = state["log_factor"]
            self.log_factor = None if factor is None else floats(factor)
            self.weights = floats(state["weights"])


def exact(values: Floats) -> list[str]:
    """Return floats as hexadecimal text, which restores the same bits."""
    return [float(value).hex() for value in values]


def floats(texts: Sequence[str]) -> Floats:
    """Return the floats that `exact` wrote."""
    return np.array([float.fromhex(text) for text in texts])


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
    """In proportion to the excess loss: r = α e / Σe + (1 − α) / D; a rule of this project.

    e = max(L_S − L_T, 0), nats. Where a domain's loss falls like e ∝ n^−b in the tokens n spent on
    it, the next token there gains b·e/n, and no token would gain more elsewhere when n ∝ e. It
    uses nats rather than perplexities, since a fresh student lags by some nats in every domain,
    where Eq. 1 puts all weight on one; and it has no memory, so that nothing accumulates.
    """
    left = np.maximum(gaps.excess, 0)
    if not left.any():  # the student is better than the teacher in every domain
        return uniform(gaps, log_before, settings)
    with np.errstate(divide="ignore"):
        return mixed(np.log(left / left.sum()), settings.alpha)


def uniform(gaps: Gaps, log_before: Floats | None, settings: Settings) -> Floats:
    """Draw all domains equally often."""
    return np.full(len(gaps.sizes), -np.log(len(gaps.sizes)))


def proportional(gaps: Gaps, log_before: Floats | None, settings: Settings) -> Floats:
    """Draw domains in proportion to their training rows: the corpus as it is."""
    shares: Floats = np.log(gaps.sizes / gaps.sizes.sum())
    return shares


def fixed(gaps: Gaps, log_before: Floats | None, settings: Settings) -> Floats:
    """Draw by given weights."""
    if settings.given is None:
        raise InputError("weighting 'fixed' needs --weights, for example --weights code=2,web=1.")
    logs: Floats = np.log(settings.given)
    return logs


def update(rule: str, gaps: Gaps, log_before: Floats | None, settings: Settings) -> Update:
    """Return the new factor and weights under a named rule.

    Rules that do not follow gaps accept domains without held-out rows; see `check_measured`.

    Raises:
        DDKError: a held-out loss is not finite.
    """
    needed = np.full(len(gaps.sizes), rule in FOLLOW_GAPS) | ~np.isnan(gaps.teacher_loss)
    if not (gaps.student_loss[needed] < MOST_LOSS).all():
        raise DDKError(
            f"a held-out loss is not finite: got {gaps.student_loss.tolist()} nats. Training "
            "diverged. Use a lower --lr, with a new run directory."
        )
    log_factor = RULES[rule](gaps, log_before, settings)
    by_size = rule in BY_SIZE_FIRST and log_before is None
    drawn = proportional(gaps, None, settings) if by_size else log_factor
    return Update(log_factor, floored(drawn))


def check_measured(rule: str, unmeasured: Sequence[str]) -> None:
    """Raise InputError where a rule follows gaps and there are domains without held-out rows."""
    if rule in FOLLOW_GAPS and unmeasured:
        raise InputError(
            f"weighting {rule!r} needs held-out rows in every domain, and these domains have none: "
            f"{', '.join(unmeasured)}. Build the cache with a larger --holdout, or use "
            "--weighting uniform, proportional or fixed."
        )


# --- parts of rules ---


def log_softmax(logits: Floats) -> Floats:
    """Return x − log Σ exp(x) without overflow."""
    shifted: Floats = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def mixed(log_r: Floats, share: float) -> Floats:
    """Return log(share · r + (1 − share) / D)."""
    with np.errstate(divide="ignore"):  # log 0 = −inf is right for shares of 0 and 1
        even = np.log((1 - share) / len(log_r))
        log_mixed: Floats = np.logaddexp(np.log(share) + log_r, even)
    return log_mixed


def floored(log_r: Floats) -> Floats:
    """Return r with a sum of one, raised to at least FLOOR / D (up to a relative FLOOR)."""
    weights: Floats = np.maximum(np.exp(log_softmax(log_r)), FLOOR / len(log_r))
    weights /= weights.sum()
    return weights


# --- given weights ---


def parse_weights(text: str) -> dict[str, float]:
    """Parse `code=0.5,web=0.3`. Raises InputError where a weight is not a number above 0."""
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.rpartition("=")
        weight = float(value) if re.fullmatch(NUMBER, value.strip()) else math.nan
        if not name or name in found or not 0 < weight < math.inf:
            raise InputError(
                f"cannot read the weight {part!r}. Give each domain once, with a number above 0: "
                "--weights code=0.5,web=0.3"
            )
        found[name] = weight
    return found


def given_weights(given: Mapping[str, float], domains: Sequence[str]) -> Floats | None:
    """Return (D) the given weights scaled to a sum of one, or None where none are given.

    Raises:
        InputError: a name is not one of the domains, or a domain has no weight.
    """
    if not given:
        return None
    for name in given:
        if name not in domains:
            raise InputError(unknown("domain", name, domains))
    if missing := [name for name in domains if name not in given]:
        raise InputError(
            f"--weights: got no weight for {', '.join(missing)}, expected one per domain of the "
            "cache. A weight may be small."
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
"""All rules, by the names that `--weighting` takes."""

FOLLOW_GAPS = {"ddk", "doremi", "eq1", "excess"}
"""Rules that need held-out rows in every domain."""

BY_SIZE_FIRST = {"ddk", "eq1"}
"""Rules of DDK's Algorithm 1: the first interval is drawn in proportion to size."""
