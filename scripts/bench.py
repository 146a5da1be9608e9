"""Measure one thing, compared with the alternatives that a user has.

    bench.py NAME [--json FILE] [OPTIONS]      bench.py --help lists the names

Each measurement is a module of `benches`, loaded when its name is given. Everything that is
compared runs on one machine, and ratios are printed next to times, because times of different
machines cannot be compared. `DDK_DATA` names the folder of corpus and teacher.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import click

from ddk_cache.console import Commands

FOLDER = Path(__file__).parent / "benches"
NO_BENCH = {
    *("common", "engines", "kinds", "listing", "material", "mixes", "outcomes", "responses"),
    "shared",
}


class Benches(Commands):
    """The modules of `benches` as commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the measurements."""
        return sorted({module.name for module in pkgutil.iter_modules([FOLDER])} - NO_BENCH)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one measurement: the `main` of its module."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"benches.{cmd_name}")
        command: click.Command = module.main
        return command


@click.command(cls=Benches, help=__doc__.splitlines()[0])
def main() -> None:
    """Choose a measurement."""


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent))
    main(prog_name="bench.py")
