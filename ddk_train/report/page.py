"""Runs as one self-contained HTML page with charts.

Style and charts are part of the page, and it loads no other file: it is larger than a page that
loads a plotting library, but opens without a network, from an e-mail, and in ten years. The layout
is in page.html; this module computes the series of its charts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ddk_cache import atomic
from ddk_train.report import charts
from ddk_train.report.compare import by_seed, compare, particulars, same_measure, spread
from ddk_train.report.numbers import number, perplexity, quantity, short
from ddk_train.report.run_report import RunReport

SMOOTHED = 0.03
"""Window of the running mean of training losses and speeds, as a share of the run."""


def gaps(report: RunReport) -> list[charts.Series]:
    """Return the student's perplexity divided by the teacher's, one series per domain."""
    losses = report.over_steps("student_loss") - report.over_steps("teacher_loss")
    steps = np.array(report.measured, np.float64)
    return [
        charts.Series(domain.name, steps, np.exp(np.minimum(gap, 700)), color=n)
        for n, (domain, gap) in enumerate(zip(report.domains, losses, strict=True))
    ]


def measured(report: RunReport, column: str) -> list[charts.Series]:
    """Return a column of the history, one series per domain."""
    steps = np.array(report.measured, np.float64)
    values = report.over_steps(column)
    return [charts.Series(d.name, steps, values[n], n) for n, d in enumerate(report.domains)]


def logged(
    report: RunReport, metric: str, label: str, color: int = 0, scale: float = 1.0
) -> list[charts.Series]:
    """Return a metric as logged, and its running mean."""
    steps, values = report.logged(metric)
    values = values * scale
    mean = charts.smooth(values, round(SMOOTHED * len(values)))
    return [
        charts.Series(label, steps, values, color, faint=True),
        charts.Series(label, steps, mean, color),
    ]


def overlaid(reports: Sequence[RunReport], metric: str) -> list[charts.Series]:
    """Return the running mean of a metric, one series per run."""
    return [logged(report, metric, report.name, n)[1] for n, report in enumerate(reports)]


def held_out(reports: Sequence[RunReport]) -> list[charts.Series]:
    """Return the mean held-out loss of the measured domains of each run.

    Step 0 is left out if there are later measurements: the loss of a fresh student would flatten
    the rest of the curve.
    """
    series = []
    for n, report in enumerate(reports):
        losses = np.ma.masked_invalid(report.over_steps("student_loss")).mean(axis=0)
        shown = slice(int(len(report.measured) > 1 and report.measured[0] == 0), None)
        steps = np.array(report.measured[shown], np.float64)
        series.append(charts.Series(report.name, steps, losses.filled(np.nan)[shown], color=n))
    return series


def write_page(reports: Sequence[RunReport], path: Path) -> None:
    """Write one self-contained page that shows the runs, atomically."""
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
    functions: tuple[Callable[..., object], ...] = (
        *(compare, by_seed, particulars, same_measure, spread),
        *(gaps, held_out, logged, measured, overlaid),
    )
    environment.globals.update({function.__name__: function for function in functions})
    # Charts are markup, and escape the names that they contain.
    environment.globals["lines"] = lambda *args, **given: Markup(charts.lines(*args, **given))
    environment.globals["stacked"] = lambda *args, **given: Markup(charts.stacked(*args, **given))
    page = environment.get_template("page.html").render(reports=reports)
    atomic.replace(path, page.encode())
