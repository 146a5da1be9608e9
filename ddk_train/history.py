"""A measurement as rows of the history: what was measured, trained on, and decided, by domain.

Domains that a run leaves out are measured too; they have no factor, and weights of zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ddk_train.evaluate import Measured
from ddk_train.run.checkpoint import State

LEFT_OUT = {"epoch": 0.0, "log_factor": math.nan, "weight_before": 0.0, "weight": 0.0}


def history_rows(
    state: State,
    found: Measured,
    trained: Mapping[str, Mapping[str, float]],
    decaying: bool,
    pairs: Mapping[str, Mapping[str, float | None]],
) -> Iterator[dict[str, Any]]:
    """Yield a row of `HISTORY` per domain.

    `trained` has the columns of `LEFT_OUT` by domain, `pairs` those of held-out pairs.
    """
    for n, name in enumerate(found.domains):
        student, teacher = found.student_loss[n], found.teacher_loss[n]
        unseen_student, unseen_teacher = state.unseen_loss.get(name, (None, None))
        yield {
            "step": state.step,
            "domain": name,
            "train_rows": int(found.sizes[n]),
            "rows_seen": state.seen.get(name, 0),
            "tokens_seen": state.tokens.get(name, 0),
            "student_loss": none_if_nan(student),
            "teacher_loss": none_if_nan(teacher),
            "fall_error": none_if_nan(found.fall_error[n]),
            "unseen_student_loss": unseen_student,
            "unseen_teacher_loss": unseen_teacher,
            "student_perplexity": none_if_nan(np.exp(student)),
            "teacher_perplexity": none_if_nan(np.exp(teacher)),
            "kl": none_if_nan(found.kl[n]),
            "decaying": decaying,
            "eval_seconds": float(found.seconds[n]),
            **{column: none_if_nan(v) for column, v in trained.get(name, LEFT_OUT).items()},
            **pairs.get(name, {}),
        }


def none_if_nan(value: float) -> float | None:
    """Return a float, or None for NaN, which JSON lacks and on which Parquet readers differ."""
    return None if math.isnan(value) else float(value)
