"""Run directories → facts, a terminal table and one HTML page with pictures. No torch.

Everything is computed from the run directory, so that a report can be made anywhere, of a run
that still goes on as of one long finished. The page holds its style and its drawings and asks
for nothing else: it is larger than one that loads a plotting library, and opens in ten years.

Losses are nats a position on held-out rows; a perplexity is exp of one. What was not measured is
None and shown as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ddk_cache import files
from ddk_train import plot
from ddk_train.run import open_run

SMOOTHED = 0.03
"""Share of a run over which the drawn training losses and speeds are averaged."""


@dataclass(frozen=True)
class Domain:
    """A domain of a run at its first and at its last measurement."""

    name: str
    teacher_loss: float | None
    first_loss: float | None
    last_loss: float | None
    first_weight: float
    last_weight: float
    rows: int
    tokens: int
    epochs: float | None

    @property
    def gap(self) -> float | None:
        """Return the loss of the student above that of the teacher, at the end."""
        if self.last_loss is None or self.teacher_loss is None:
            return None
        return self.last_loss - self.teacher_loss


@dataclass(frozen=True)
class RunReport:
    """What a run directory tells."""

    name: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    metrics: list[dict[str, Any]]
    """The logged steps; see `Run.metrics`. Any value but the step may be missing."""
    history: list[dict[str, Any]]
    """The measurements; see `ddk_train.run.HISTORY`. Never empty."""

    @cached_property
    def measured(self) -> list[int]:
        """Return the steps after which gaps were measured."""
        return sorted({row["step"] for row in self.history})

    @cached_property
    def domains(self) -> list[Domain]:
        """Return the domains, in the order of the history."""
        by_name: dict[str, list[dict[str, Any]]] = {}
        for row in self.history:
            by_name.setdefault(row["domain"], []).append(row)
        return [
            Domain(
                name,
                teacher_loss=finite(rows[-1]["teacher_loss"]),
                first_loss=finite(rows[0]["student_loss"]),
                last_loss=finite(rows[-1]["student_loss"]),
                first_weight=rows[0]["weight"],
                last_weight=rows[-1]["weight"],
                rows=rows[-1]["rows_seen"],
                tokens=rows[-1]["tokens_seen"],
                epochs=finite(rows[-1]["epoch"]),
            )
            for name, rows in by_name.items()
        ]

    @cached_property
    def mean(self) -> Domain:
        """Return the mean loss over domains, each counting once, with the sum of what was seen."""

        def mean(losses: Iterable[float | None]) -> float | None:
            known = [loss for loss in losses if loss is not None]
            return fmean(known) if known else None

        return Domain(
            "mean",
            teacher_loss=mean(d.teacher_loss for d in self.domains),
            first_loss=mean(d.first_loss for d in self.domains),
            last_loss=mean(d.last_loss for d in self.domains),
            first_weight=sum(d.first_weight for d in self.domains),
            last_weight=sum(d.last_weight for d in self.domains),
            rows=sum(d.rows for d in self.domains),
            tokens=sum(d.tokens for d in self.domains),
            epochs=None,
        )

    @property
    def worst(self) -> Domain | None:
        """Return the domain that ends farthest from the teacher."""
        known = [(domain.gap, domain) for domain in self.domains if domain.gap is not None]
        return max(known, key=lambda pair: pair[0], default=(None, None))[1]

    @property
    def steps(self) -> int:
        """Return the last step that was logged or measured."""
        return max([*self.measured, *(int(line["step"]) for line in self.metrics)])

    @property
    def tokens(self) -> int:
        """Return the tokens trained on, as far as was logged or measured."""
        return max([self.mean.tokens, *(int(line.get("tokens") or 0) for line in self.metrics)])

    @property
    def tokens_per_second(self) -> float | None:
        """Return the trained tokens over the time they took."""
        last = self.metrics[-1] if self.metrics else {}
        tokens, seconds = finite(last.get("tokens")), finite(last.get("seconds"))
        return tokens / seconds if tokens and seconds else None

    def logged(self, name: str) -> tuple[plot.Floats, plot.Floats]:
        """Return (N) steps and (N) values of a metric, where it was logged and is finite."""
        pairs = [(line["step"], finite(line.get(name))) for line in self.metrics]
        known = np.array([pair for pair in pairs if pair[1] is not None], np.float64).reshape(-1, 2)
        return known[:, 0], known[:, 1]

    def over_steps(self, column: str) -> plot.Floats:
        """Return (D, M) values of a column of the history, NaN where there is none."""
        found = {(row["domain"], row["step"]): finite(row[column]) for row in self.history}
        values = [[found.get((d.name, step)) for step in self.measured] for d in self.domains]
        return np.array(values, np.float64)


# --- facts ---


def load(paths: Sequence[Path]) -> list[RunReport]:
    """Read run directories; one that is named twice is read once.

    Raises:
        InputError: a path is no run directory.
        DDKError: a run has no measurement yet.
    """
    whole = list(dict.fromkeys(path.resolve() for path in paths))
    reports = []
    for name, run in zip(short_names(whole), map(open_run, whole), strict=True):
        told = run.config
        found = told["settings"], told.get("provenance", {}), run.metrics(), run.history()
        reports.append(RunReport(name, *found))
    return reports


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of different paths, as few as tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    # A name that is not Unicode is still a name, but no page and no terminal can hold it.
    return [name.encode(errors="replace").decode() for name in names]


def finite(value: Any) -> float | None:
    """Return a number, or None for what is missing, NaN or infinite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def perplexity(loss: float | None) -> float | None:
    """Return exp(loss), or None where there is no loss or no such number."""
    return math.exp(loss) if loss is not None and loss < 700 else None


def to_json(reports: Sequence[RunReport]) -> list[dict[str, Any]]:
    """Return the facts of each run as plain JSON values."""
    return [
        {
            "name": report.name,
            "steps": report.steps,
            "tokens": report.tokens,
            "tokens_per_second": report.tokens_per_second,
            "measured": report.measured,
            "mean_loss": report.mean.last_loss,
            "worst": report.worst and report.worst.name,
            "domains": {
                domain.name: asdict(domain) | {"ratio": perplexity(domain.gap)}
                for domain in report.domains
            },
            "settings": report.settings,
            "provenance": report.provenance,
        }
        for report in reports
    ]


# --- numbers as text ---


def number(value: float | None, spec: str) -> str:
    """Write a number, or a dash for none."""
    return "–" if value is None else format(value, spec).replace("-", "−")


def short(value: float | None) -> str:
    """Write a perplexity or a ratio, which may be anything from one to millions."""
    return number(value, ",.2f" if value is None or value < 1000 else ",.0f")


def quantity(value: float | None) -> str:
    """Write a count with three figures."""
    for scale, suffix in plot.SCALES:
        if value is not None and value >= scale:
            return f"{value / scale:.{2 - min(2, int(math.log10(value / scale)))}f} {suffix}"
    return number(value, ",.0f")


# --- several runs ---


def compare(reports: Sequence[RunReport]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return how far runs got: rows of a value and its difference to the first run, as text.

    Three rows for the mean and for the worst domain, then one for each domain. Values are final
    held-out losses; the worst gap is of such a loss to the teacher's. The mean is over the
    domains that every run has measured, so that it compares like with like.
    """
    found = [{d.name: d.last_loss for d in report.domains} for report in reports]
    names = dict.fromkeys(name for losses in found for name in losses)
    rows = [(name, [losses.get(name) for losses in found]) for name in names]
    shared = np.array([losses for _, losses in rows if None not in losses], np.float64)
    means = shared.mean(axis=0).tolist() if len(shared) else [None] * len(reports)
    worst = [report.worst for report in reports]
    return [
        ("mean of domains", _differences(means)),
        ("worst gap", _differences([one.gap if one else None for one in worst])),
        ("worst domain", [(one.name if one else "–", "") for one in worst]),
        *((name, _differences(losses)) for name, losses in rows),
    ]


def _differences(losses: Sequence[float | None]) -> list[tuple[str, str]]:
    first = losses[0]
    cells = [(number(first, ".3f"), "")]
    for loss in losses[1:]:
        change = "" if loss is None or first is None else number(loss - first, "+z.3f")
        cells.append((number(loss, ".3f"), change))
    return cells


def particulars(reports: Sequence[RunReport]) -> list[tuple[str, list[str]]]:
    """Return what else tells runs apart: how long they trained, and the settings that differ."""
    rows = [
        ("steps", [number(report.steps, ",") for report in reports]),
        ("tokens", [quantity(report.tokens) for report in reports]),
        ("tokens a second", [quantity(report.tokens_per_second) for report in reports]),
    ]
    for name in dict.fromkeys(name for report in reports for name in report.settings):
        values = [str(report.settings.get(name, "–")) for report in reports]
        if len(set(values)) > 1 and name not in ("run", "steps"):
            rows.append((name, values))
    return rows


def same_measure(reports: Sequence[RunReport]) -> bool:
    """Return whether the teacher's losses agree: the same rows were held out by every run."""
    losses = [(d.name, d.teacher_loss) for report in reports for d in report.domains]
    known = {name: loss for name, loss in losses if loss is not None}
    return all(math.isclose(known[name], loss, rel_tol=1e-3) for name, loss in losses if loss)


# --- the terminal ---


def show(reports: Sequence[RunReport]) -> None:
    """Print a table for each run and, of several, one that compares them."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a file has no width that would excuse lost figures
        console = Console(width=200)
    for report in reports:
        _show_run(report, console)
    if len(reports) > 1:
        _show_comparison(reports, console)


def _show_run(report: RunReport, console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("perplexity", box=None, pad_edge=False)
    student = ("student\nfirst", "student\nlast", "over\nteacher")
    for column in ("teacher", *student, "weight, %", "tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for d in [*report.domains, report.mean]:
        losses = (d.teacher_loss, d.first_loss, d.last_loss, d.gap)
        weights = f"{100 * d.first_weight:.1f} → {100 * d.last_weight:5.1f}"
        figures = [short(perplexity(loss)) for loss in losses]
        table.add_row(Text(d.name), *figures, weights, quantity(d.tokens))
    loss, speed = number(report.mean.last_loss, ".3f"), quantity(report.tokens_per_second)
    facts = f"{report.steps:,} steps, {speed} tokens/s, mean held-out loss {loss}"
    if worst := report.worst:
        facts += f", worst domain {worst.name}"
    console.print(Text(report.name, "bold"))
    console.print(table)
    console.print(Text(facts + "\n"))


def _show_comparison(reports: Sequence[RunReport], console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("held-out loss", box=None, pad_edge=False)
    for report in reports:
        table.add_column(Text(report.name), justify="right")
    for label, cells in compare(reports):
        table.add_row(Text(label), *(Text(" ".join(filter(None, cell))) for cell in cells))
    console.print(table)
    if not same_measure(reports):
        console.print("The held-out rows or the teacher differ: these losses are on two scales.")


# --- the page ---


def gaps(report: RunReport) -> list[plot.Series]:
    """Return the perplexity of the student over that of the teacher, a line for each domain."""
    losses = report.over_steps("student_loss") - report.over_steps("teacher_loss")
    steps = np.array(report.measured, np.float64)
    return [
        plot.Series(domain.name, steps, np.exp(np.minimum(gap, 700)), colour=n)
        for n, (domain, gap) in enumerate(zip(report.domains, losses, strict=True))
    ]


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
        loader=PackageLoader("ddk_train", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, perplexity=perplexity, quantity=quantity, short=short)
    told = (compare, gaps, held_out, logged, overlaid, particulars, same_measure)
    environment.globals.update({function.__name__: function for function in told})
    # The drawings are markup, and escape the names in them themselves.
    environment.globals["lines"] = lambda *args, **given: Markup(plot.lines(*args, **given))
    environment.globals["stacked"] = lambda *args, **given: Markup(plot.stacked(*args, **given))
    page = environment.get_template("report.html").render(reports=reports)
    files.replace(path, page.encode())
