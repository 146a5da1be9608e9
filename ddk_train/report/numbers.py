"""Numbers as people read them; what there is none of is None, and written as a dash."""

from __future__ import annotations

import math
from typing import Any

from ddk_train.report.charts import SCALES


def finite(value: Any) -> float | None:
    """Return a number, or None for what is missing, NaN or infinite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def perplexity(loss: float | None) -> float | None:
    """Return exp(loss), or None where there is no loss or no such number."""
    return math.exp(loss) if loss is not None and loss < 700 else None


def number(value: float | None, spec: str) -> str:
    """Write a number, or a dash for none."""
    return "–" if value is None else format(value, spec).replace("-", "−")


def short(value: float | None) -> str:
    """Write a perplexity or a ratio, which may be anything from one to millions."""
    return number(value, ",.2f" if value is None or value < 1000 else ",.0f")


def quantity(value: float | None) -> str:
    """Write a count with three figures."""
    for scale, suffix in SCALES:
        if value is not None and value >= scale:
            return f"{value / scale:.{2 - min(2, int(math.log10(value / scale)))}f} {suffix}"
    return number(value, ",.0f")
