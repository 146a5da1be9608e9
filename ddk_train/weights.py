"""Gaps between student and teacher → sampling weights of the domains. Pure NumPy, in float64.

DDK is Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models" (NeurIPS
2024, arXiv 2407.16154). Its ratios are of perplexities, which run into the thousands for a fresh
student, so both equations are computed in log space: the softmax then saturates as it should,
where a plain exp would overflow. Nothing is clipped; that would be another rule.

Arrays have one entry for each domain, D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddk_cache import DDKError, InputError

Floats = npt.NDArray[np.float64]


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
        return np.exp(self.student_loss - self.teacher_loss)


Rule = Callable[[Gaps, Floats | None, float], Floats]
"""(gaps, log r before or None at the first measurement, α) → log r after, (D).

The factor r is kept as its logarithm: Eq. 1 on a fresh student gives factors below the smallest
float64, which a later interval must be able to bring back.
"""


def log_softmax(logits: Floats) -> Floats:
    """Return x − log Σ exp(x) without overflow."""
    shifted: Floats = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def ddk(gaps: Gaps, log_before: Floats | None, alpha: float) -> Floats:
    """Factor smooth updating.

    At first Eq. 1: r = softmax(ℓ_S / ℓ_T). Then Eq. 2: ψ = r · exp(ℓ_S / ℓ_T) and
    r′ = α ψ / Σψ + (1 − α) / D. Each r′ lies in [(1 − α) / D, α + (1 − α) / D].
    """
    if log_before is None:
        return log_softmax(gaps.ratio)
    log_follow = log_softmax(log_before + gaps.ratio)
    with np.errstate(divide="ignore"):  # log 0 = −inf is what α = 0 and α = 1 mean
        even = np.log((1 - alpha) / len(log_follow))
        log_after: Floats = np.logaddexp(np.log(alpha) + log_follow, even)
    return log_after


def uniform(gaps: Gaps, log_before: Floats | None, alpha: float) -> Floats:
    """Draw every domain alike."""
    return np.full(len(gaps.sizes), -np.log(len(gaps.sizes)))


def proportional(gaps: Gaps, log_before: Floats | None, alpha: float) -> Floats:
    """Draw domains in proportion to their training rows: the corpus as it is."""
    shares: Floats = np.log(gaps.sizes / gaps.sizes.sum())
    return shares


def update(rule: str, gaps: Gaps, log_before: Floats | None, alpha: float) -> Floats:
    """Return the new log r under a named rule, checked.

    Raises:
        InputError: the rule follows gaps and a domain has no held-out rows.
        DDKError: a loss is not finite.
    """
    if rule in FOLLOW_GAPS:
        losses = np.stack([gaps.student_loss, gaps.teacher_loss])
        if np.isnan(gaps.teacher_loss).any():
            raise InputError(
                f"weighting {rule!r} follows the gap on held-out rows; a domain has none. Build "
                "the cache with a larger --holdout, or use --weighting uniform or proportional."
            )
        if not np.isfinite(losses).all():
            raise DDKError(f"a held-out loss is not finite: {losses.tolist()}")
    return RULES[rule](gaps, log_before, alpha)


RULES: dict[str, Rule] = {"ddk": ddk, "uniform": uniform, "proportional": proportional}
"""Every rule by the name that `--weighting` takes."""

FOLLOW_GAPS = {"ddk"}
"""Rules that need held-out rows in every domain."""
