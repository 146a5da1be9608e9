"""What the measurements share: where the data are, the record of a run, tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from ddk_cache import InputError

Floats = npt.NDArray[np.float64]

json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write JSON.",
)


def data() -> Path:
    """Return the folder of `corpus/` and `teacher/`. Raises InputError where it is unset."""
    if not (folder := os.environ.get("DDK_DATA")):
        raise InputError("set DDK_DATA to a folder with corpus/*.parquet and teacher/.")
    return Path(folder)


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of several calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def once(work: Callable[[], object], device: str = "cpu") -> float:
    """Return the seconds of a call, until the device is done with it."""
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: str) -> None:
    """Wait for a device."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def spread_of(values: Sequence[float] | Floats) -> float:
    """Return the standard deviation over seeds; of one seed it is not known."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def plus_minus(values: Sequence[float] | Floats, spec: str = ".4f") -> str:
    """Return mean ± standard deviation over seeds."""
    return f"{np.mean(values):{spec}} ± {spread_of(values):{spec.lstrip('+')}}"


class Record:
    """The settings, versions and tables of one measurement: printed, and kept for `--json`."""

    def __init__(self, name: str, settings: Mapping[str, Any], packages: Sequence[str]) -> None:
        self.facts: dict[str, Any] = {
            "bench": name,
            "settings": dict(settings),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_cpu()}",
            "versions": {"python": platform.python_version()} | _versions(packages),
            "tables": {},
        }
        width = None if sys.stdout.isatty() else 200  # a file has no width of its own
        self.console = Console(soft_wrap=True, width=width)
        for what in ("settings", "versions"):
            pairs = (f"{key} {value}" for key, value in self.facts[what].items())
            self.console.print(f"{what}: " + ", ".join(pairs), highlight=False)
        self.console.print(f"machine: {self.facts['machine']}", highlight=False)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print rows as a table, empty where a row lacks a key, and keep them."""
        self.facts["tables"][title] = list(rows)
        table = Table(title=title, title_justify="left")
        columns = list(dict.fromkeys(column for row in rows for column in row))
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*(_text(row.get(column, "")) for column in columns))
        self.console.print(table)

    def write(self, path: Path | None) -> None:
        """Write everything as JSON, if a path is given."""
        if path:
            path.write_text(json.dumps(self.facts, indent=1) + "\n")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
