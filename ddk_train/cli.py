"""ddk-train run | report | cut: options and printing.

The options of `run` are the fields of `TrainConfig`, so there is one text for each setting. Heavy
modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import click

from ddk_cache import DDKError
from ddk_cache.console import Commands, options_from, say
from ddk_train.config import CHOICES, TrainConfig, read_settings


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddk-distill")
def main() -> None:
    """Train students from a cache, and compare how they did."""


def take_defaults(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    """Make the settings of a file the defaults of the options, which take them as text."""
    if value:
        found = read_settings(value)
        ctx.default_map = {n: str(v) for n, v in found.items() if n not in ("cache", "run")}


@main.command()
@click.argument("cache")
@click.argument("run")
@click.option("--config", expose_value=False, is_eager=True, callback=take_defaults,
              type=click.Path(path_type=Path),
              help="YAML file of settings, or the config.json of a run to repeat. Options given "
                   "on the command line win over it, CACHE and RUN always do.")  # fmt: skip
@options_from(TrainConfig, choices=CHOICES, skip={"cache", "run"})
def run(**settings: Any) -> None:
    """Train a student from CACHE into the directory RUN, or resume a run that stopped."""
    config = TrainConfig(**settings)
    from ddk_cache import open_cache

    open_cache(config.cache)  # says at once what is wrong with it, before torch is imported

    from ddk_train.job import train

    finished = train(config)
    if os.environ.get("RANK", "0") != "0":
        return  # one process prints
    from ddk_train.report.run_report import load
    from ddk_train.report.table import show

    try:
        show(load([finished.path]))
    except (DDKError, OSError, UnicodeError) as error:  # the student is finished all the same
        say(f"the table cannot be shown: {error}")
    look = shlex.join(["ddk-train", "report", config.run])
    say(f"the student is in {finished.student}; look at the run:  {look}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path),
              help="Where to write the page.  [default: report.html in the first run]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True,
              help="Print JSON instead of tables; a page only with --html.")  # fmt: skip
def report(runs: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Compare RUNS in tables and on one HTML page."""
    from ddk_train.report.page import write_page
    from ddk_train.report.run_report import load, to_json
    from ddk_train.report.table import show

    reports = load(list(runs))
    if as_json:
        click.echo(json.dumps(to_json(reports), indent=1))
    else:
        show(reports)
    if html or not as_json:
        page = html or runs[0] / "report.html"
        write_page(reports, page)
        click.echo(f"page: {page}", err=as_json)


@main.command()
@click.argument("teacher")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", help="Layers to keep, counted from 0, for example 0,3,6.")
@click.option("--keep", type=int, help="Number of layers to keep, evenly spaced, first and last "
              "included.")  # fmt: skip
def cut(teacher: str, out: Path, layers: str | None, keep: int | None) -> None:
    """Save a student of some layers of TEACHER, a directory or hub id, in OUT."""
    from ddk_train.student.cut import cut_student, parse_layers

    cut_student(teacher, out, layers=parse_layers(layers) if layers else None, keep=keep)
    say(f"The student is in {out}. Train it:  ddk-train run CACHE RUN --student {out}")
