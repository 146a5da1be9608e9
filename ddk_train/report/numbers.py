"""Numbers for people. A missing value is None, and is written as a dash."""

from __future__ import annotations

import math
from typing import Any

SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
"""Suffixes of large numbers, largest first."""


def finite(value: Any) -> float | None:
    """Return a number, or None for a value that is missing, NaN or infinite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def perplexity(loss: float | None) -> float | None:
    """Return exp(loss), or None for a missing loss or one whose exponential overflows."""
    return math.exp(loss) if loss is not None and loss < 700 else None


def number(value: float | None, spec: str) -> str:
    """Format a number, or a dash for None."""
    return "–" if value is None else format(value, spec).replace("-", "−")


def short(value: float | None) -> str:
    """Format a perplexity or a ratio, which may be anything from one to millions."""
    return number(value, ",.2f" if value is None or value < 1000 else ",.0f")


def quantity(value: float | None) -> str:
    """Format a count with three significant digits."""
    for scale, suffix in SCALES:
        if value is not None and value >= scale:
            return f"{value / scale:.{2 - min(2, int(math.log10(value / scale)))}f} {suffix}"
    return number(value, ",.0f")
