"""The options that several commands of `ddk-cache` share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ddk_cache.build.config import BuildConfig
from ddk_cache.build.share import check_rank
from ddk_cache.console import options_from
from ddk_cache.errors import InputError
from ddk_cache.format.spec import COMPRESSIONS, LEARN, PACKINGS, TOO_LONG
from ddk_cache.models.config import CHOICES, TeacherConfig

Command = TypeVar("Command", bound=Callable[..., Any])

ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")

RANKS = (("RANK", "WORLD_SIZE"), ARRAY, ("SLURM_PROCID", "SLURM_NTASKS"))
"""Where torchrun and SLURM say which process this is, of how many."""

SETTINGS = [
    click.option("--tokenizer", help="Directory or hub id.  [default: the teacher's]"),
    options_from(
        BuildConfig,
        choices={
            "compression": COMPRESSIONS,
            "packing": ("auto", *PACKINGS),
            "too_long": TOO_LONG,
            "learn": LEARN,
        },
    ),
]
"""What a cache contains."""

HOW = [options_from(TeacherConfig, choices=CHOICES)]
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


def which_process(
    rank: int | None, world: int | None, *, together: bool = False
) -> tuple[int, int]:
    """Return rank and world: as given, or as torchrun or SLURM say.

    Processes that run one teacher `together` are one process here, so only the number in an array
    of jobs counts.

    Raises:
        InputError: they are not numbers, or `rank` is not below `world`.
    """
    for rank_name, world_name in (ARRAY,) if together else RANKS:
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
