"""A measurement as a command, and the report that it ends in: figures, and what is wrong."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ddk_cache.console import Commands


@dataclass
class Report:
    """What was done and found."""

    figures: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


Measure = Callable[..., Report]
MEASURES: dict[str, Measure] = {}


@click.group(cls=Commands, context_settings={"show_default": True})
def main() -> None:
    """Stress a cache, and report every violation."""


def general(command: Any) -> Any:
    """Give a command the options that all have."""
    command = click.option("--json", "file", type=click.Path(path_type=Path))(command)
    return click.option("--seed", type=int, default=0)(command)


def measurement(measure: Measure) -> Measure:
    """Make a command of a function (work folder, seed, sizes) → Report."""
    name = measure.__name__

    @wraps(measure)
    def command(seed: int, file: Path | None, **sizes: Any) -> None:
        conclude({name: perform(measure, seed, sizes)}, file)

    MEASURES[name] = measure
    main.command(name)(general(command))
    return measure


def perform(measure: Measure, seed: int, sizes: Mapping[str, Any]) -> Report:
    """Run one measurement in a folder of its own and show what came of it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        report = measure(Path(work), seed, **sizes)
    report.figures["seconds"] = round(time.monotonic() - began, 1)
    table = Table(measure.__name__, "", box=None, pad_edge=False)
    for name, figure in report.figures.items():
        table.add_row(name, str(figure))
    Console().print(table)
    for line in report.wrong[:40]:
        click.echo(f"WRONG  {line}")
    click.echo(f"violations: {len(report.wrong)}\n")
    return report


def conclude(reports: Mapping[str, Report], file: Path | None) -> None:
    """Write the figures, and exit by them."""
    if file:
        file.write_text(json.dumps({name: vars(r) for name, r in reports.items()}, indent=1))
    sys.exit(any(report.wrong for report in reports.values()))


@main.command("all")
@general
def everything(seed: int, file: Path | None) -> None:
    """Run every measurement at its full size."""
    reports = {}
    for name, measure in MEASURES.items():
        options = main.commands[name].params
        sizes = {str(o.name): o.default for o in options if o.name not in ("seed", "file")}
        reports[name] = perform(measure, seed, sizes)
    conclude(reports, file)
