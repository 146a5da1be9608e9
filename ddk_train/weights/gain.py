"""The rule `gain`: half by what is left to learn, half by what was lately learned.

Both halves estimate how much the next rows of a domain are worth, −∂L/∂ln n, up to a common factor:
the gap where all domains learn alike and the teacher can be reached, the fall per row without
assuming either. The gap alone keeps drawing rows of a domain that no student can learn; the fall
alone is noisy. The price is memory: the measurements of a window, which the history records.

Arrays have one entry per domain, D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ddk_cache import InputError
from ddk_train.weights.factors import by_share, even, mixed
from ddk_train.weights.gaps import Before, Floats, Gaps, Settings, settled

TRUSTED = 3.0
"""Standard errors from which progress counts as known."""

FREE_EPOCHS, WORN_EPOCHS = 4.0, 15.0
"""Passes over the rows of a domain that are as good as new rows, and passes after them in which the
value of a row falls by a factor e (after Muennighoff et al. 2023, arXiv 2305.16264)."""


def gain(gaps: Gaps, before: Before, settings: Settings) -> Floats:
    """In proportion to gap and progress; a rule of this project.

    r = (1 − α) / D + α [(1 − ρ) e / Σe + ρ u / Σu], where e is the excess loss over the teacher
    (see `reducible`) and u the fall of the held-out loss per row drawn of that domain over the last
    `window` measurements (see `progress`). r is even at first, and where no e is above 0. Domains
    whose progress is not known keep e / Σe; the others divide the rest by u.

    Raises:
        InputError: the measurement does not say how many rows were drawn.
    """
    window = settled([*before.past, gaps], settings.window)
    fall, known = progress(window or [gaps], settings.shrink)
    left = reducible(gaps, settings)
    if before.log_factor is None or not left.any():
        return even(len(gaps.sizes))
    by_gap = left / left.sum()
    by_progress = by_gap.copy()
    if fall[known].any():
        by_progress[known] = by_gap[known].sum() * (fall[known] / fall[known].sum())
    share = (1 - settings.rho) * by_gap + settings.rho * by_progress
    return mixed(by_share(share), settings.alpha)


def reducible(gaps: Gaps, settings: Settings) -> Floats:
    """Return (D) the excess loss e = max(L_S − L_T, 0), nats, as far as it counts.

    With a tilt τ it is e · exp(τ (e − max e)), which favors the worst gap. With the guard against
    repetition it is multiplied by exp(−max(0, epochs − 4) / 15).
    """
    left = np.maximum(gaps.excess, 0)
    if settings.tilt:
        left = left * np.exp(settings.tilt * (left - left.max()))
    if settings.repetition_guard and gaps.epochs is not None:
        left = left * np.exp(-np.maximum(0, gaps.epochs - FREE_EPOCHS) / WORN_EPOCHS)
    return left


class Progress(NamedTuple):
    """What a window of measurements says."""

    fall: Floats
    """(D) fall of the loss per row drawn, nats, none below 0."""
    known: npt.NDArray[np.bool_]
    """(D) where it can be trusted."""


def progress(window: Sequence[Gaps], shrink: bool) -> Progress:
    """Return how far losses fell per row between the first and the last measurement of a window.

    A fall is known where it is at least 3 standard errors; and one smaller than that where 3
    standard errors are below the mean fall, so that a fall of the usual size would have been seen.
    With `shrink`, falls are drawn to their mean by their noise instead (James and Stein), and each
    is known. A loss that rose by 3 standard errors says what the rows of other domains took away,
    not what those of its own give, so nothing is known.
    """
    first, last = window[0], window[-1]
    rows, change = drawn(last) - drawn(first), first.student_loss - last.student_loss
    noise = np.full(len(rows), np.nan) if last.fall_error is None else last.fall_error
    known = (rows > 0) & (change >= -TRUSTED * noise)  # no number is at least NaN
    fall, error = (
        np.where(known, values / np.maximum(rows, 1), 0)
        for values in (np.maximum(change, 0), noise)
    )
    if known.any():
        if shrink:
            fall[known] = shrunk(fall[known], error[known])
        else:
            known &= TRUSTED * error <= np.maximum(fall, fall[known].mean())
    return Progress(fall, known)


def drawn(gaps: Gaps) -> Floats:
    """Return (D) the rows drawn so far. Raises InputError where the measurement lacks them."""
    if gaps.rows_seen is None:
        raise InputError("weighting 'gain': got Gaps without rows_seen, expected (D) rows drawn.")
    return gaps.rows_seen


def shrunk(values: Floats, errors: Floats) -> Floats:
    """Return values drawn to their mean, the positive-part James–Stein estimate.

    v̂ = v̄ + (1 − (D − 3) · mean(s²) / Σ(v − v̄)²)⁺ (v − v̄); fewer than four values stay.
    """
    apart = values - values.mean()
    spread = (apart**2).sum()
    noise = max(len(values) - 3, 0) * (errors**2).mean()
    return np.asarray(values.mean() + apart * (max(1 - noise / spread, 0.0) if spread else 0.0))
