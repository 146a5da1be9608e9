"""Run directories → facts, a terminal table and one HTML page with pictures. No torch.

Everything is computed from the run directory, so that a report can be made anywhere, of a run
that still goes on as of one long finished. The page holds its style and its drawings and asks
for nothing else: it is larger than one that loads a plotting library, and opens in ten years.

Losses are nats a position on held-out rows; a perplexity is exp of one. What was not measured is
None and shown as a dash.
"""

from __future__ import annotations

import json
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
    def teacher(self) -> float | None:
        """Return the perplexity of the teacher."""
        return perplexity(self.teacher_loss)

    @property
    def first(self) -> float | None:
        """Return the perplexity of the student at the first measurement."""
        return perplexity(self.first_loss)

    @property
    def last(self) -> float | None:
        """Return the perplexity of the student at the last measurement."""
        return perplexity(self.last_loss)

    @property
    def ratio(self) -> float | None:
        """Return the perplexity of the student over that of the teacher, at the end."""
        if self.last_loss is None or self.teacher_loss is None:
            return None
        return perplexity(self.last_loss - self.teacher_loss)


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
        known = [domain for domain in self.domains if domain.ratio is not None]
        return max(known, key=lambda domain: domain.ratio or 0.0, default=None)

    @property
    def steps(self) -> int:
        """Return the last step that was logged or measured."""
        return max([self.measured[-1], *(line["step"] for line in self.metrics)])

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
    runs = [open_run(path) for path in whole]
    return [
        RunReport(name, run.config["settings"], run.config["provenance"], run.metrics(), rows)
        for name, run in zip(short_names(whole), runs, strict=True)
        if (rows := run.history())
    ]


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
            "tokens": report.mean.tokens,
            "tokens_per_second": report.tokens_per_second,
            "measured": report.measured,
            "mean_loss": report.mean.last_loss,
            "worst": report.worst and report.worst.name,
            "domains": {
                domain.name: asdict(domain)
                | {
                    "teacher_perplexity": domain.teacher,
                    "first_perplexity": domain.first,
                    "last_perplexity": domain.last,
                    "ratio": domain.ratio,
                }
                for domain in report.domains
            },
            "settings": report.settings,
            "provenance": report.provenance,
        }
        for report in reports
    ]


# --- numbers as text ---


def number(value: float | None, spec: str = ",.2f") -> str:
    """Write a number, or a dash for none."""
    return "–" if value is None else format(value, spec).replace("-", "−")


def quantity(value: float | None) -> str:
    """Write a count with three figures."""
    for scale, suffix in plot.SCALES:
        if value is not None and value >= scale:
            return f"{value / scale:.{2 - min(2, int(math.log10(value / scale)))}f} {suffix}"
    return number(value, ",.0f")


# --- several runs ---


@dataclass(frozen=True)
class Cell:
    """What one run has to say in a comparison."""

    text: str
    change: str = ""
    """The difference to the first run."""
    better: bool | None = None


def compare(reports: Sequence[RunReport]) -> dict[str, list[Cell]]:
    """Return how far runs got: a row for the mean, one for the worst domain, one for each domain.

    Values are final held-out losses, of the worst domain the distance to the teacher. The mean is
    over the domains that every run has measured, so that it compares like with like.
    """
    found = [{d.name: d.last_loss for d in report.domains} for report in reports]
    names = dict.fromkeys(name for losses in found for name in losses)
    rows = {name: [losses.get(name) for losses in found] for name in names}
    shared = [name for name, losses in rows.items() if None not in losses]
    means = [fmean(losses[n] or 0.0 for n in shared) if shared else None for losses in found]
    worst = [report.worst for report in reports]
    distances = [d and (d.last_loss or 0.0) - (d.teacher_loss or 0.0) for d in worst]
    return {
        "mean over domains": _cells(means),
        "worst domain, above teacher": _cells(distances, [d.name if d else "" for d in worst]),
    } | {name: _cells(losses) for name, losses in rows.items()}


def _cells(losses: Sequence[float | None], notes: Sequence[str] = ()) -> list[Cell]:
    cells = []
    for i, loss in enumerate(losses):
        text = " ".join(filter(None, [*notes[i : i + 1], number(loss, ".3f")]))
        if i == 0 or loss is None or losses[0] is None:
            cells.append(Cell(text))
            continue
        change = round(loss - losses[0], 3)
        cells.append(Cell(text, number(change, "+.3f"), change < 0 if change else None))
    return cells
