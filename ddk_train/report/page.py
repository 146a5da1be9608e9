"""Runs as one HTML page with pictures, which a person would rather look at than read logs.

The page holds its style and its drawings and asks for nothing else: it is larger than one that
loads a plotting library, and opens in ten years. The template beside this file says what stands
where; here is what it draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ddk_cache import atomic
from ddk_train.report import charts as plot
from ddk_train.report.compare import by_seed, compare, particulars, same_measure, spread
from ddk_train.report.numbers import number, perplexity, quantity, short
from ddk_train.report.run_report import RunReport

SMOOTHED = 0.03
"""Share of a run over which the drawn training losses and speeds are averaged."""


def gaps(report: RunReport) -> list[plot.Series]:
    """Return the perplexity of the student over that of the teacher, a line for each domain."""
    losses = report.over_steps("student_loss") - report.over_steps("teacher_loss")
    steps = np.array(report.measured, np.float64)
    return [
        plot.Series(domain.name, steps, np.exp(np.minimum(gap, 700)), colour=n)
        for n, (domain, gap) in enumerate(zip(report.domains, losses, strict=True))
    ]


def measured(report: RunReport, column: str) -> list[plot.Series]:
    """Return a column of the history, a line for each domain."""
    steps = np.array(report.measured, np.float64)
    values = report.over_steps(column)
    return [plot.Series(d.name, steps, values[n], n) for n, d in enumerate(report.domains)]


def logged(
    report: RunReport, metric: str, label: str, colour: int = 0, scale: float = 1.0
) -> list[plot.Series]:
    """Return a metric as it was logged, and smoothed."""
    steps, values = report.logged(metric)
    values = values * scale
    mean = plot.smooth(values, round(SMOOTHED * len(values)))
    return [
        plot.Series(label, steps, values, colour, faint=True),
        plot.Series(label, steps, mean, colour),
    ]


def overlaid(reports: Sequence[RunReport], metric: str) -> list[plot.Series]:
    """Return a metric of each run, smoothed."""
    return [logged(report, metric, report.name, n)[1] for n, report in enumerate(reports)]


def held_out(reports: Sequence[RunReport]) -> list[plot.Series]:
    """Return the mean held-out loss of the measured domains of each run.

    Not of step 0, if there are others: a fresh student's loss would flatten all that follows.
    """
    series = []
    for n, report in enumerate(reports):
        losses = np.ma.masked_invalid(report.over_steps("student_loss")).mean(axis=0)
        shown = slice(int(len(report.measured) > 1 and report.measured[0] == 0), None)
        steps = np.array(report.measured[shown], np.float64)
        series.append(plot.Series(report.name, steps, losses.filled(np.nan)[shown], colour=n))
    return series


def write_page(reports: Sequence[RunReport], path: Path) -> None:
    """Write one page that shows the runs and asks for no other file; whole or not at all."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("ddk_train", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, perplexity=perplexity, quantity=quantity, short=short)
    told: tuple[Callable[..., object], ...] = (
        *(compare, by_seed, particulars, same_measure, spread),
        *(gaps, held_out, logged, measured, overlaid),
    )
    environment.globals.update({function.__name__: function for function in told})
    # The drawings are markup, and escape the names in them themselves.
    environment.globals["lines"] = lambda *args, **given: Markup(plot.lines(*args, **given))
    environment.globals["stacked"] = lambda *args, **given: Markup(plot.stacked(*args, **given))
    page = environment.get_template("page.html").render(reports=reports)
    atomic.replace(path, page.encode())
