"""ddk-cache plan | build | info | verify.

Options are checked, and files looked for, before anything heavy is imported, so that a mistake is
told at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ddk_cache.console import Commands, Known, Progress, say
from ddk_cache.errors import CacheError, InputError, UnfinishedCacheError
from ddk_cache.format.spec import COMPRESSIONS, TargetSpec
from ddk_cache.storage.open import open_storage

Command = TypeVar("Command", bound=Callable[..., Any])

DTYPES = ["auto", "float32", "bfloat16", "float16"]

RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
         ("SLURM_PROCID", "SLURM_NTASKS"))  # fmt: skip
"""Where torchrun and SLURM say which process this is, of how many."""

WHAT = [
    click.option("--tokenizer", help="Directory or hub id.  [default: the teacher's]"),
    click.option("--seq-len", type=click.IntRange(1), default=1024, show_default=True,
                 help="Positions in a row."),
    click.option("--targets", default="sampled:16", show_default=True,
                 help="What is kept of each distribution, topk:K or sampled:B."),
    click.option("--temperature", "temperatures", type=float, multiple=True,
                 help="Temperature beside 1 at which topk targets can be trained on; may be "
                 "given several times."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
                 help="Of the draws of sampled targets."),
    click.option("--compression", type=Known("compression", COMPRESSIONS),
                 default=COMPRESSIONS[0], show_default=True,
                 help="small: zstd, fewest bytes; fast: lz4, least work at reading."),
    click.option("--holdout", type=click.FloatRange(0, 1, max_open=True), default=0.05,
                 show_default=True, help="Share of documents held out for measuring."),
    click.option("--chunk-rows", type=click.IntRange(1),
                 help="Rows in a chunk, the unit of reading.  [default: 4,096 tokens]"),
    click.option("--shard-rows", type=click.IntRange(1),
                 help="Rows in a shard, the unit of work.  [default: 262,144 tokens]"),
]  # fmt: skip
"""What a cache is."""

HOW = [
    click.option("--dtype", type=Known("dtype", DTYPES), default="auto", show_default=True,
                 help="Of the teacher."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 …"),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
]  # fmt: skip
"""How the teacher is run."""


SERVED = [
    click.option("--model",
                 help="Name of the model, where --teacher is the http:// address of a server.  "
                 "[default: its only one]"),
    click.option("--head",
                 help="Head file (see 'ddk-cache head') or checkpoint: use hidden states of the "
                 "server, not log-probabilities."),
]  # fmt: skip
"""How a teacher behind a serving engine is used."""


def options(*groups: list[Any]) -> Callable[[Command], Command]:
    """Give a command the options of several groups, in order."""

    def give(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return give


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddk")
def main() -> None:
    """Pay for the teacher once: plan, build and check caches of its next-token targets."""


@main.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("cache")
@click.option("--teacher",
              help="Model directory, hub id, or http://host:port of a server, to measure bytes and "
              "hours with.")  # fmt: skip
@options(WHAT, HOW, SERVED)
@click.option("--probe-rows", type=click.IntRange(1), default=16, show_default=True,
              help="Rows to run through the teacher.")  # fmt: skip
@click.option("--student-speed", type=click.FloatRange(0), default=50_000.0, show_default=True,
              help="Tokens a second of the student that will read the cache.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine.")
def plan(
    corpus: Path,
    cache: str,
    teacher: str | None,
    tokenizer: str | None,
    probe_rows: int,
    student_speed: float,
    as_json: bool,
    targets: str,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    model: str | None,
    head: str | None,
    **settings: Any,
) -> None:
    """Say what building CACHE from CORPUS will cost. Nothing is written."""
    from ddk_cache.corpus.sources import find_sources

    TargetSpec.parse(targets)
    sources = find_sources(corpus, say)
    if not (teacher or tokenizer):
        raise InputError("give --teacher, or at least --tokenizer, to count tokens with.")
    from ddk_cache.build import estimate
    from ddk_cache.build.job import make_spec
    from ddk_cache.build.scoring import Scorer, first_batch
    from ddk_cache.build.teacher import no_teacher
    from ddk_cache.format.plan import ShardKey
    from ddk_cache.hf import load_tokenizer

    words = load_tokenizer(tokenizer or tokenizer_beside(str(teacher), head))
    loaded = no_teacher(len(words))
    if teacher:
        how: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "trust_remote_code": trust_remote_code,
        }
        loaded = find_teacher(teacher, words, targets, model, head, **how)
    spec = make_spec(loaded, words, target_spec=targets, **settings)
    with Progress("counting", 0, "tokens") as progress:
        counted = estimate.count(
            sources,
            words,
            seq_len=spec.seq_len,
            holdout=spec.holdout,
            probe_rows=probe_rows,
            advance=progress.advance,
        )
    probed = None
    if teacher:
        scorer = Scorer(loaded, spec, first_batch(loaded, spec))
        key = ShardKey("probe", "train", 0)
        probed = estimate.probe(
            spec, counted.sample, lambda tokens: scorer.score(key, tokens, lambda _: None).arrays
        )
    facts = estimate.estimate(spec, counted, probed, cache, student_speed)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        estimate.show(facts)


@main.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("cache")
@click.option("--teacher", required=True,
              help="Model directory, hub id, or http://host:port of a server.")  # fmt: skip
@options(WHAT, HOW, SERVED)
@click.option("--batch-rows", type=click.IntRange(1),
              help="Rows in one call to the teacher.  [default: by memory]")  # fmt: skip
@click.option("--grow", is_flag=True,
              help="Add new domains, and documents at the end of old ones.")  # fmt: skip
@click.option(
    "--rank",
    type=click.IntRange(0),
    help="Which process this is, of several on one cache.  [default: from RANK or SLURM]",
)
@click.option("--world", type=click.IntRange(1), help="How many there are.")
def build(
    corpus: Path,
    cache: str,
    teacher: str,
    tokenizer: str | None,
    targets: str,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    model: str | None,
    head: str | None,
    rank: int | None,
    world: int | None,
    **settings: Any,
) -> None:
    """Run the teacher over CORPUS once and store its targets in CACHE, a path or a URL.

    CORPUS is a directory in which each file or sub-folder is a domain, or a YAML mix file. A
    build that was stopped goes on by the same command. Any number of processes may be given the
    same command: they share the work.
    """
    from ddk_cache.corpus.sources import find_sources

    TargetSpec.parse(targets)
    open_storage(cache)
    place = which_process(rank, world)
    sources = find_sources(corpus, say)

    from ddk_cache.build.job import build
    from ddk_cache.hf import load_tokenizer

    words = load_tokenizer(tokenizer or tokenizer_beside(teacher, head))
    how: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded = find_teacher(teacher, words, targets, model, head, **how)
    settings |= {"target_spec": targets, "rank": place[0], "world": place[1]}
    build(cache, sources, loaded, words, **settings)
    say(f"{cache} is finished. Train from it:  ddk-train run {cache} RUN --student …")


def tokenizer_beside(teacher: str, head: str | None) -> str:
    """Return where the tokenizer of a teacher is, if it is not named.

    Raises:
        InputError: it must be named.
    """
    if "://" not in teacher:
        return teacher
    if head and Path(head).is_dir():
        return head
    raise InputError(f"{teacher} is a server: give the --tokenizer of its model.")


def find_teacher(
    teacher: str,
    words: Any,
    targets: str,
    model: str | None,
    head: str | None,
    *,
    trust_remote_code: bool,
    **how: Any,
) -> Any:
    """Load a teacher, or connect to the server that runs it.

    Raises:
        InputError: there is no such teacher, or the options do not belong together.
    """
    from ddk_cache.build.served import is_address, load_served
    from ddk_cache.build.teacher import load_teacher

    if is_address(teacher):
        spec = TargetSpec.parse(targets)
        return load_served(teacher, words, model=model, head=head, targets=spec, **how)
    if model or head:
        raise InputError("--model and --head are for a --teacher that is an http:// address.")
    return load_teacher(teacher, trust_remote_code=trust_remote_code, **how)


@main.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def head(model: str, out: Path, trust_remote_code: bool) -> None:
    """Copy the output head of MODEL, a directory or hub id, to the file OUT.

    With --head, a build needs nothing else of a model that a server runs. The rest of the
    checkpoint is not read.
    """
    from ddk_cache.head import extract_head

    found = extract_head(model, trust_remote_code=trust_remote_code)
    found.save(out)
    size = f"{found.vocab_size:,} × {found.hidden_size:,}"
    say(f"{out} holds the head of {model}: {size}, hash {found.hash()}")


def which_process(rank: int | None, world: int | None) -> tuple[int, int]:
    """Return rank and world: as given, or as torchrun or SLURM say.

    Raises:
        InputError: they make no sense.
    """
    for rank_name, world_name in RANKS:
        if rank is None and rank_name in os.environ and world_name in os.environ:
            try:
                rank, world = int(os.environ[rank_name]), int(os.environ[world_name])
            except ValueError:
                raise InputError(f"{rank_name} or {world_name} is no number.") from None
            # A SLURM array may be numbered from 1, or with gaps.
            rank %= max(world, 1)
    rank, world = rank or 0, world or 1
    if not 0 <= rank < max(world, 1):
        raise InputError(f"rank {rank} has to be below the number of processes, {world}.")
    return rank, world


@main.command()
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine.")
def info(cache: str, as_json: bool) -> None:
    """Show what CACHE holds: domains, rows, what was seen of the teacher, bytes a token."""
    from ddk_cache.describe import describe, show
    from ddk_cache.read.cache import open_cache

    facts = describe(open_cache(cache, unfinished=True))
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        show(facts)


@main.command()
@click.argument("cache")
@click.option("--drop-bad", is_flag=True,
              help="Remove what is bad, so that 'build' makes just that again.")  # fmt: skip
@click.option("--teacher", help="Run this teacher again on some rows, and compare.")
@click.option("--rows", type=click.IntRange(1), default=32, show_default=True,
              help="How many rows.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Which rows.")
@options(HOW)
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
    from ddk_cache import verify as audit
    from ddk_cache.read.cache import open_cache

    opened = open_cache(cache, unfinished=True)
    with Progress("verifying", audit.bytes_below(opened), "bytes") as progress:
        problems = audit.verify(opened, progress.advance)
    facts: dict[str, Any] = {"problems": [problem.text for problem in problems]}
    if drop_bad:
        facts["removed"] = audit.drop_bad(opened, problems)
    elif teacher and not problems:
        facts["replay"] = vars(replay(opened, teacher, rows, seed, how))
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        show_verified(facts)
    if drop_bad and facts["removed"]:
        say(f"{len(problems)} problems; run the same 'ddk-cache build' again to mend {cache}.")
        return
    if problems:
        raise CacheError(f"{len(problems)} problems in {cache}; --drop-bad removes what is bad.")
    if facts.get("replay", {}).get("bad"):
        raise CacheError(f"{cache} is not what this teacher says.")
    try:
        opened.require_finished()
    except UnfinishedCacheError as error:
        say(str(error))


def replay(opened: Any, teacher: str, rows: int, seed: int, how: dict[str, Any]) -> Any:
    """Load the teacher of a cache and compare it with what is stored.

    Raises:
        MismatchError: it is another teacher than the cache's.
    """
    from ddk_cache.build.create import compare
    from ddk_cache.build.scoring import Scorer
    from ddk_cache.build.teacher import load_teacher
    from ddk_cache.verify import replay

    model = load_teacher(teacher, **how)
    compare(opened.where, opened.spec.teacher, model.identity)

    def score(key: Any, tokens: Any, batch_rows: int) -> Any:
        return Scorer(model, opened.spec, batch_rows).score(key, tokens, lambda _: None).arrays

    return replay(opened, score, rows, seed)


def show_verified(facts: dict[str, Any]) -> None:
    """Print what verifying found."""
    for text in facts["problems"][:50]:
        click.echo(f"BAD  {text}")
    for path in facts.get("removed", []):
        click.echo(f"removed  {path}")
    if found := facts.get("replay"):
        click.echo(
            f"teacher on {found['rows']} rows, nats: stored − live {found['stored_mean']:.2e} "
            f"(largest {found['stored_max']:.2e}); live − live {found['control_mean']:.2e} "
            f"(largest {found['control_max']:.2e}); limit for a row {found['limit']:.2e}"
        )
        for name in found["bad"][:20]:
            click.echo(f"BAD  {name}")
    if not facts["problems"]:
        click.echo("every committed byte is as it was committed")
