"""Runs as tables, drawn by rich. In a file the width is fixed, so that no figure is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddk_train.report.compare import by_seed, compare, same_measure, spread
from ddk_train.report.numbers import number, perplexity, quantity, short
from ddk_train.report.run_report import RunReport


def show(reports: Sequence[RunReport]) -> None:
    """Print a table for each run and, if there are several, one that compares them."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # rich would assume 80 columns for a file
        console = Console(width=200)
    for report in reports:
        _show_run(report, console)
    if len(reports) > 1:
        _show_comparison(reports, console)


def _show_run(report: RunReport, console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("perplexity", box=None, pad_edge=False)
    student = ("student\nfirst", "student\nlast", "over\nteacher", "unseen rows,\nover teacher")
    for column in ("teacher", *student, "weight, %", "tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for d in [*report.domains, report.mean]:
        losses = (d.teacher_loss, d.first_loss, d.last_loss, d.gap, d.unseen_gap)
        weights = f"{100 * d.first_weight:.1f} → {100 * d.last_weight:5.1f}"
        weights = "left out" if d.left_out else weights
        figures = [short(perplexity(loss)) for loss in losses]
        table.add_row(Text(d.name), *figures, weights, quantity(d.tokens))
    loss, speed = number(report.mean.last_loss, ".3f"), quantity(report.tokens_per_second)
    facts = f"{report.steps:,} steps, {speed} tokens/s, mean held-out loss {loss}"
    if report.eval_share is not None:
        facts += f", {report.eval_share:.1%} of the time spent measuring"
    if report.preferred is not None:
        facts += f", {report.preferred:.1%} of held-out pairs preferred"
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
    if groups := by_seed(reports):
        table = Table("over seeds", box=None, pad_edge=False)
        for group in groups:
            table.add_column(Text(group.name), justify="right")
        for label, texts in spread(groups):
            table.add_row(Text(label), *map(Text, texts))
        console.print(table)
    if not same_measure(reports):
        console.print("The held-out rows or the teacher differ: these losses are not comparable.")
