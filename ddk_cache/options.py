"""The options that several commands of `ddk-cache` share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ddk_cache.build.config import BuildConfig
from ddk_cache.build.share import check_rank
from ddk_cache.console import Known, options_from
from ddk_cache.errors import InputError
from ddk_cache.format.spec import COMPRESSIONS, LEARN

Command = TypeVar("Command", bound=Callable[..., Any])

DTYPES = ["auto", "float32", "bfloat16", "float16"]

RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
         ("SLURM_PROCID", "SLURM_NTASKS"))  # fmt: skip
"""Where torchrun and SLURM say which process this is, of how many."""

SETTINGS = [
    click.option("--tokenizer", help="Directory or hub id.  [default: the teacher's]"),
    options_from(BuildConfig, choices={"compression": COMPRESSIONS, "learn": LEARN}),
]
"""What a cache holds."""

HOW = [
    click.option("--dtype", type=Known("dtype", DTYPES), default="auto", show_default=True,
                 help="Floating-point type of the teacher."),
    click.option("--device", default="auto", show_default=True,
                 help="Device of the teacher: auto, cpu, cuda, cuda:1, …"),
    click.option("--trust-remote-code", is_flag=True,
                 help="Run code that comes with the model or tokenizer."),
]  # fmt: skip
"""How the teacher is run."""


SERVED = [
    click.option("--model",
                 help="Name of the model on the server that --teacher is the address of.  "
                 "[default: its only one]"),
    click.option("--head",
                 help="Head file (from 'ddk-cache head') or checkpoint of the model on the server: "
                 "use hidden states instead of log-probabilities."),
]  # fmt: skip
"""How a teacher behind a serving engine is used."""


PROCESSES = [
    click.option("--rank", type=int,
                 help="Number of this process among several, counted from 0.  "
                 "[default: from RANK or SLURM]"),
    click.option("--world", type=int,
                 help="Number of processes.  [default: from WORLD_SIZE or SLURM]"),
]  # fmt: skip
"""Which process this is."""


def options(*groups: list[Any]) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the options of several groups, in order."""

    def give(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return give


def which_process(rank: int | None, world: int | None) -> tuple[int, int]:
    """Return rank and world: as given, or as torchrun or SLURM say.

    Raises:
        InputError: they are not numbers, or `rank` is not below `world`.
    """
    for rank_name, world_name in RANKS:
        if rank is None and rank_name in os.environ and world_name in os.environ:
            rank, world = _number(rank_name), _number(world_name)
            # A SLURM array may be numbered from 1, or with gaps.
            rank %= max(world, 1)
    rank, world = rank or 0, 1 if world is None else world
    check_rank(rank, world)
    return rank, world


def _number(name: str) -> int:
    """Return the number in an environment variable."""
    try:
        return int(os.environ[name])
    except ValueError:
        raise InputError(
            f"{name}: got {os.environ[name]!r}, expected a whole number. Unset the variable, or "
            "give --rank and --world."
        ) from None
