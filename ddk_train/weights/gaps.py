"""What a rule of weights takes: a measurement, the measurements before it, and settings.

A rule depends on recorded measurements alone, so every array here is a column of a run's history.
The price is that a rule with a new need adds a column.

Arrays have one entry per domain, D.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gaps:
    """What one measurement found. The fields after the first three are used by rule `gain`."""

    student_loss: Floats
    """(D) nats per position on held-out rows; NaN where a domain has none."""
    teacher_loss: Floats
    """(D) the teacher's loss on the same rows."""
    sizes: Floats
    """(D) training rows."""
    _: KW_ONLY
    rows_seen: Floats | None = None
    """(D) training rows drawn so far."""
    epochs: Floats | None = None
    """(D) passes over the training rows so far."""
    fall_error: Floats | None = None
    """(D) standard error of the fall of the loss since the first measurement of the window, from
    the same rows at both ends; NaN where it is not known."""
    decaying: bool = False
    """The learning rate was in the decay of schedule `wsd`."""

    @property
    def ratio(self) -> Floats:
        """Return (D) perplexity of the student over that of the teacher."""
        return np.exp(self.excess)

    @property
    def excess(self) -> Floats:
        """Return (D) loss of the student above that of the teacher."""
        return self.student_loss - self.teacher_loss

    def pick(self, places: Sequence[int]) -> Gaps:
        """Return the measurement of some domains, by their places."""
        error = None if self.fall_error is None else self.fall_error[places]
        arrays = (self.student_loss[places], self.teacher_loss[places], self.sizes[places])
        return Gaps(*arrays, fall_error=error)

    def filled(self, unseen_student: Floats, unseen_teacher: Floats) -> Gaps:
        """Return the measurement with a gap for domains that have no held-out rows.

        It is that of training rows drawn for the first time, (D) nats per position, NaN where
        none was drawn yet; until then it is the mean gap of the other domains.
        """
        missing = np.isnan(self.teacher_loss)
        student = np.where(missing, unseen_student, self.student_loss)
        teacher = np.where(missing, unseen_teacher, self.teacher_loss)
        unknown = missing & np.isnan(student - teacher)
        known = (student - teacher)[~unknown]
        student = np.where(unknown, known.mean() if len(known) else 0.0, student)
        return dataclasses.replace(
            self, student_loss=student, teacher_loss=np.where(unknown, 0.0, teacher)
        )


class Settings(NamedTuple):
    """The parameters of a rule."""

    alpha: float = 0.5
    """The share of the factor that follows the gaps; the rest is even."""
    given: Floats | None = None
    """(D) the weights of rule `fixed`."""
    rho: float = 0.5
    """The share of `alpha` that follows progress (rule `gain`)."""
    window: int = 3
    """Measurements back to which progress is taken (rule `gain`)."""
    shrink: bool = False
    """Shrink progress towards its mean by its standard error (rule `gain`)."""
    tilt: float = 0.0
    """τ in 1/nats: gaps count by exp(τ · gap) more (rules `excess` and `gain`)."""
    repetition_guard: bool = False
    """Gaps of domains repeated more than four times count less (rules `excess` and `gain`)."""


class Before(NamedTuple):
    """What a rule knows of the measurements before."""

    log_factor: Floats | None = None
    """(D) log r after the last one; None at the first.

    The factor r is kept as its logarithm: Eq. 1 on a fresh student gives factors below the smallest
    float64, which a later interval must be able to bring back.
    """
    past: Sequence[Gaps] = ()
    """The measurements, the last at the end; of many, at least the last of `settled`."""


def settled(measurements: Sequence[Gaps], window: int) -> list[Gaps]:
    """Return the measurements that progress is taken from, `window` + 1 at most.

    While the learning rate decays, every loss falls by that alone, and most where it is noisy; so
    progress stays what it was before.
    """
    return [gaps for gaps in measurements if not gaps.decaying][-(window + 1) :]
