"""ddk-cache estimate | build | generate | pair | info | verify | head: options and printing.

Options are checked, and files looked for, before anything heavy is imported, so that a mistake is
reported at once.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ddk_cache.build.config import BuildConfig
from ddk_cache.build.share import check_rank
from ddk_cache.console import Commands, Known, Progress, options_from, say, show_logs
from ddk_cache.errors import InputError, UnfinishedCacheError
from ddk_cache.format.spec import COMPRESSIONS
from ddk_cache.sequences.config import SamplingConfig
from ddk_cache.storage.open import open_storage

Command = TypeVar("Command", bound=Callable[..., Any])

DTYPES = ["auto", "float32", "bfloat16", "float16"]

RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
         ("SLURM_PROCID", "SLURM_NTASKS"))  # fmt: skip
"""Where torchrun and SLURM say which process this is, of how many."""

SETTINGS = [
    click.option("--tokenizer", help="Directory or hub id.  [default: the teacher's]"),
    options_from(BuildConfig, choices={"compression": COMPRESSIONS}),
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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddk-distill")
def main() -> None:
    """Pay for the teacher once: estimate, build and check caches of its next-token targets."""


@main.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("cache")
@click.option("--teacher",
              help="Model directory, hub id or http://host:port of a server, to measure bytes and "
              "hours with.")  # fmt: skip
@options(SETTINGS, HOW, SERVED)
@click.option("--probe-rows", type=click.IntRange(1), default=16, show_default=True,
              help="Rows to run through the teacher.")  # fmt: skip
@click.option("--student-speed", type=click.FloatRange(0), default=50_000.0, show_default=True,
              help="Speed of the student that will read the cache [tokens/s].")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def estimate(
    corpus: Path,
    cache: str,
    teacher: str | None,
    tokenizer: str | None,
    probe_rows: int,
    student_speed: float,
    as_json: bool,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    model: str | None,
    head: str | None,
    **settings: Any,
) -> None:
    """Estimate what building CACHE from CORPUS will cost. Nothing is written."""
    from ddk_cache.corpus.sources import find_sources

    config = BuildConfig(**settings)
    sources = find_sources(corpus)
    if not (teacher or tokenizer):
        raise InputError("give --teacher, or at least --tokenizer, to count tokens with.")
    from ddk_cache.build.estimate import estimate_cache, show
    from ddk_cache.hf import load_tokenizer, pick_device
    from ddk_cache.served.teacher import find_teacher

    pick_device(device)
    if teacher:
        how: dict[str, Any] = {"dtype": dtype, "device": device, "model": model, "head": head}
        loaded, words = find_teacher(
            teacher, tokenizer, config.targets, trust_remote_code=trust_remote_code, **how
        )
    else:
        loaded = None
        words = load_tokenizer(str(tokenizer), trust_remote_code=trust_remote_code)
    facts = estimate_cache(
        cache,
        sources,
        words,
        loaded,
        config,
        probe_rows=probe_rows,
        student_speed=student_speed,
    )
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        show(facts)


@main.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("cache")
@click.option("--teacher", required=True,
              help="Model directory, hub id or http://host:port of a server.")  # fmt: skip
@options(SETTINGS, HOW, SERVED)
@click.option("--grow", is_flag=True,
              help="Add new domains, and documents at the end of old ones.")  # fmt: skip
@click.option("--rank", type=int,
              help="Number of this process among several on one cache, counted from 0.  "
              "[default: from RANK or SLURM]")  # fmt: skip
@click.option("--world", type=int,
              help="Number of processes on one cache.  "
              "[default: from WORLD_SIZE or SLURM]")  # fmt: skip
def build(
    corpus: Path,
    cache: str,
    teacher: str,
    tokenizer: str | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    model: str | None,
    head: str | None,
    grow: bool,
    rank: int | None,
    world: int | None,
    **settings: Any,
) -> None:
    """Run the teacher over CORPUS once and store its targets in CACHE, a path or a URL.

    CORPUS is a directory in which each file or sub-folder is a domain, or a YAML mix file. A
    build that was stopped resumes where it stopped; run the same command again. Several
    processes given the same command share the work.
    """
    from ddk_cache.corpus.sources import find_sources

    config = BuildConfig(**settings)
    storage = open_storage(cache)
    rank, world = which_process(rank, world)
    show_logs(first=rank == 0)
    sources = find_sources(corpus)

    from ddk_cache.build.create import check_place
    from ddk_cache.build.job import build_cache
    from ddk_cache.served.teacher import find_teacher

    check_place(storage)
    how: dict[str, Any] = {"dtype": dtype, "device": device, "model": model, "head": head}
    loaded, words = find_teacher(
        teacher, tokenizer, config.targets, trust_remote_code=trust_remote_code, **how
    )
    build_cache(cache, sources, loaded, words, config, grow=grow, rank=rank, world=world)
    if rank == 0:
        train = f"ddk-train run {shlex.quote(cache)} RUN --student …"
        say(f"{cache} is finished. Train from it:  {train}")


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


@main.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--teacher", required=True, help="Model directory or hub id.")
@click.option("--tokenizer", help="Directory or hub id.  [default: the teacher's]")
@options([options_from(SamplingConfig)], HOW, PROCESSES)
def generate(
    prompts: Path,
    out: Path,
    teacher: str,
    tokenizer: str | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    rank: int | None,
    world: int | None,
    **settings: Any,
) -> None:
    """Let the teacher answer PROMPTS; OUT becomes a corpus of the responses.

    PROMPTS is a corpus whose files have a column 'prompt', or 'messages' that end with the user's
    turn. A job that was stopped resumes when the same command is run again, and several processes
    given the same command share the work.
    """
    from ddk_cache.corpus.sources import find_sources

    config, sources = SamplingConfig(**settings), find_sources(prompts)
    rank, world = which_process(rank, world)
    show_logs(first=rank == 0)
    from ddk_cache.hf import load_tokenizer
    from ddk_cache.sequences.decode import load_responder
    from ddk_cache.sequences.generate import generate as write

    how: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    words = load_tokenizer(tokenizer or teacher, **how)
    responder = load_responder(teacher, words, dtype=dtype, device=device, **how)
    write(sources, out, responder, config, rank=rank, world=world)
    if rank == 0:
        words = shlex.join(["ddk-cache", "build", str(out), "CACHE", "--teacher", teacher])
        say(f"{out} is finished. Cache the teacher's distributions on it:  {words}")


@main.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@click.argument("cache")
@click.option("--teacher", required=True,
              help="Model directory, hub id or http://host:port of a server: the teacher of CACHE.")  # fmt: skip
@click.option("--student", required=True, help="Model directory or hub id of the initial student.")
@click.option("--tokenizer", help="Directory or hub id.  [default: the teacher's]")
@click.option("--answers", type=click.Path(path_type=Path),
              help="Directory for the student's answers.  [default: CACHE.answers]")  # fmt: skip
@options([options_from(SamplingConfig, skip={"samples"})], HOW, SERVED, PROCESSES)
@click.option("--batch-rows", type=click.IntRange(1),
              help="Rows in one call to the teacher.  [default: as many as fit in memory]")  # fmt: skip
def pair(
    prompts: Path,
    cache: str,
    teacher: str,
    student: str,
    tokenizer: str | None,
    answers: Path | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    model: str | None,
    head: str | None,
    rank: int | None,
    world: int | None,
    batch_rows: int | None,
    **settings: Any,
) -> None:
    """Add pairs of responses, the teacher's and the student's, to CACHE.

    PROMPTS has the teacher's responses: the directory that 'generate' wrote, or a corpus with
    'messages' that end with the assistant's turn. The student answers each prompt once, and the
    teacher scores both responses.
    """
    from ddk_cache.corpus.sources import find_sources
    from ddk_cache.storage.open import is_url

    config, sources = SamplingConfig(**settings), find_sources(prompts)
    if not answers and is_url(cache):
        raise InputError(f"{cache} is a URL. Give --answers, a local directory.")
    answers = answers or Path(f"{cache.rstrip('/')}.answers")
    rank, world = which_process(rank, world)
    place, how = {"rank": rank, "world": world}, {"dtype": dtype, "device": device}
    show_logs(first=rank == 0)
    from ddk_cache.hf import load_tokenizer
    from ddk_cache.read.cache import open_cache
    from ddk_cache.sequences.decode import load_responder
    from ddk_cache.sequences.pair import answer_prompts, build_pairs
    from ddk_cache.served.teacher import find_teacher

    trust = {"trust_remote_code": trust_remote_code}
    with open_cache(cache) as opened:
        words = load_tokenizer(tokenizer or teacher, **trust)
        writer = load_responder(student, words, **how, **trust)
        answer_prompts(opened, sources, writer, answers, config, **place)
        del writer  # the teacher may need its memory
        served: dict[str, Any] = {"model": model, "head": head, **how, **trust}
        loaded, words = find_teacher(teacher, tokenizer, "topk:1", **served)
        build_pairs(opened, sources, answers, loaded, words, batch_rows=batch_rows, **place)
    if rank == 0:
        train = f"ddk-train run {shlex.quote(cache)} RUN --student {shlex.quote(student)}"
        say(f"the pairs of {cache} are finished. Train from them:  {train} --pairs dpkd")


@main.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def head(model: str, out: Path, trust_remote_code: bool) -> None:
    """Copy the output head of MODEL, a directory or hub id, to the file OUT.

    With it as --head, a build needs nothing else of a model that a server runs. The rest of the
    checkpoint is not read.
    """
    from ddk_cache.head import extract_head

    found = extract_head(model, trust_remote_code=trust_remote_code)
    found.save(out)
    size = f"{found.vocab_size:,} × {found.hidden_size:,}"
    say(f"{out} holds the head of {model}: {size}, hash {found.hash()}")


@main.command()
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine.")
def info(cache: str, as_json: bool) -> None:
    """Show what CACHE holds: domains, rows, statistics of the teacher, bytes per token."""
    from ddk_cache.describe import describe, show
    from ddk_cache.read.pairs import open_parts

    with open_parts(cache) as parts:
        facts, *pairs = map(describe, parts)
    if as_json:
        click.echo(json.dumps({**facts, **{"pairs": part for part in pairs}}, indent=1))
        return
    show(facts)
    for part in pairs:
        click.echo("\npairs of responses, two rows each:")
        show(part)


@main.command()
@click.argument("cache")
@click.option("--drop-bad", is_flag=True,
              help="Remove what is bad, so that 'build' makes just that again.")  # fmt: skip
@click.option("--teacher", help="Run this teacher again on some rows and compare.")
@click.option("--rows", type=click.IntRange(1), default=32, show_default=True,
              help="Number of rows for --teacher.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True,
              help="Seed for choosing the rows for --teacher.")  # fmt: skip
@options(HOW, SERVED)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine.")
def verify(
    cache: str,
    drop_bad: bool,
    teacher: str | None,
    rows: int,
    seed: int,
    as_json: bool,
    **how: Any,
) -> None:
    """Hash every committed byte of CACHE and compare it with what was committed."""
    if drop_bad and teacher:
        raise InputError("--drop-bad and --teacher: use one at a time.")
    from ddk_cache import verify as verification
    from ddk_cache.read.pairs import open_pairs, open_parts

    with open_parts(cache) as parts:
        opened, *pairs = parts
        total = sum(map(verification.bytes_to_hash, parts))
        with Progress("verifying", total, "bytes") as progress:
            checked = [(part, verification.verify(part, progress.advance)) for part in parts]
        problems = [problem for _, found in checked for problem in found]
        facts: dict[str, Any] = {"problems": [problem.text for problem in problems]}
        replayed = None
        if drop_bad:
            facts["removed"] = [
                name for part, found in checked for name in verification.drop_bad(part, found)
            ]
        elif teacher and not problems:
            from ddk_cache.served.teacher import find_teacher

            spec, words = opened.spec, str(opened.tokenizer_path)
            how["vocab_size"] = spec.vocab_size
            loaded, _ = find_teacher(teacher, words, str(spec.targets), **how)
            replayed = verification.replay(opened, loaded, rows, seed)
            facts["replay"] = vars(replayed)
        if as_json:
            click.echo(json.dumps(facts, indent=1))
        else:
            show_verified(facts)
        if drop_bad and problems:
            again = (
                "'ddk-cache build' (for what is below pairs/, 'ddk-cache pair')"
                if pairs
                else ("'ddk-cache build'")
            )
            say(f"Run the same {again} again to repair {cache}.")
            return
        verification.require_sound(opened, problems, replayed)
        try:
            opened.require_finished()
            for _ in pairs:
                open_pairs(cache)
        except UnfinishedCacheError as error:
            say(str(error))


def show_verified(facts: dict[str, Any]) -> None:
    """Print what verifying found."""
    from ddk_cache.describe import printable

    for text in facts["problems"][:50]:
        click.echo(f"BAD  {printable(text)}")
    for path in facts.get("removed", []):
        click.echo(f"removed  {printable(path)}")
    if found := facts.get("replay"):
        click.echo(
            f"teacher on {found['rows']} rows, nats: stored − live {found['stored_mean']:.2e} "
            f"(largest {found['stored_max']:.2e}); live − live {found['control_mean']:.2e} "
            f"(largest {found['control_max']:.2e}); limit for a row {found['limit']:.2e}"
        )
        for name in found["bad"][:20]:
            click.echo(f"BAD  {name}")
    if not facts["problems"]:
        click.echo("OK: all hashes match.")
