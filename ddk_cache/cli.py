"""ddk-cache estimate | build | generate | pair | info | show | verify | head: the command line.

Options are checked, and files looked for, before anything heavy is imported, so that a mistake is
reported at once.
"""

from __future__ import annotations

import json
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddk_cache.build.config import BuildConfig
from ddk_cache.console import Commands, Known, Progress, config_from, say, show_logs
from ddk_cache.errors import InputError, UnfinishedCacheError
from ddk_cache.models.config import TeacherConfig
from ddk_cache.options import HOW, PROCESSES, SERVED, SETTINGS, options, which_process
from ddk_cache.sequences import cli as sequences
from ddk_cache.storage.open import open_storage
from ddk_cache.transfer import commands as transfer
from ddk_cache.types import SPLITS, TRAIN

if TYPE_CHECKING:
    from ddk_cache.inspect.verify import Replay
    from ddk_cache.read.cache import Cache


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddk-distill")
def main() -> None:
    """Pay for the teacher once: estimate, build and check caches of its next-token targets."""


for command in (transfer.copy, transfer.push, transfer.pull, transfer.import_):
    main.add_command(command)


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
    model: str | None,
    head: str | None,
    **settings: Any,
) -> None:
    """Estimate what building CACHE from CORPUS will cost. Nothing is written."""
    from ddk_cache.corpus.sources import find_sources

    how = config_from(TeacherConfig, settings)
    config = BuildConfig(**settings)
    sources = find_sources(corpus)
    if not (teacher or tokenizer):
        raise InputError("give --teacher, or at least --tokenizer, to count tokens with.")
    from ddk_cache.build.estimate import estimate_cache, show
    from ddk_cache.hf import load_tokenizer, pick_device
    from ddk_cache.served.teacher import find_teacher

    pick_device(how.device)
    if teacher:
        loaded, words = find_teacher(
            teacher, tokenizer, config.targets, how, model=model, head=head
        )
    else:
        loaded = None
        words = load_tokenizer(str(tokenizer), trust_remote_code=how.trust_remote_code)
    with loaded.in_step() if loaded else nullcontext(True) as first:
        if not first:
            return
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
@options(PROCESSES)
@click.option("--ray", metavar="ADDRESS",
              help="Ray cluster whose workers build: local (this machine alone), auto (the one "
              "that this machine is part of) or an address.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1),
              help="Number of workers for --ray.  "
              "[default: as many as there is room for]")  # fmt: skip
@click.option("--gpus-per-worker", type=click.FloatRange(0),
              help="GPUs of each worker for --ray.  "
              "[default: 1 if the cluster has any]")  # fmt: skip
def build(
    corpus: Path,
    cache: str,
    teacher: str,
    tokenizer: str | None,
    model: str | None,
    head: str | None,
    grow: bool,
    rank: int | None,
    world: int | None,
    ray: str | None,
    workers: int | None,
    gpus_per_worker: float | None,
    **settings: Any,
) -> None:
    """Run the teacher over CORPUS once and store its targets in CACHE, a path or a URL.

    CORPUS is a directory in which each file or sub-folder is a domain, or a YAML mix file. A
    build that was stopped resumes where it stopped; run the same command again. Several
    processes given the same command share the work.
    """
    from ddk_cache.cluster.order import Order

    how = config_from(TeacherConfig, settings)
    order = Order(
        corpus=corpus,
        cache=cache,
        teacher=teacher,
        tokenizer=tokenizer,
        config=BuildConfig(**settings),
        how=how,
        model=model,
        head=head,
        grow=grow,
    )
    open_storage(cache)
    first = True
    if ray is None:
        if workers is not None or gpus_per_worker is not None:
            raise InputError("--workers and --gpus-per-worker are for --ray.")
        rank, world = which_process(rank, world, together=how.tensor_parallel > 1)
        show_logs(first=rank == 0)
        first = order.build(rank, world) and rank == 0
    elif rank is not None or world is not None:
        raise InputError("--ray counts its own workers: leave out --rank and --world.")
    elif how.tensor_parallel > 1:
        raise InputError("--ray and --tensor-parallel: a worker of Ray is one process. Give one.")
    else:
        from ddk_cache.cluster.driver import build_with_ray

        build_with_ray(order, ray, workers, gpus_per_worker)
    if first:
        train = f"ddk-train run {shlex.quote(cache)} RUN --student …"
        say(f"{cache} is finished. Train from it:  {train}")


@main.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
def head(model: str, out: Path, trust_remote_code: bool, revision: str | None) -> None:
    """Copy the output head of MODEL, a directory or hub id, to the file OUT.

    With it as --head, a build needs nothing else of a model that a server runs. The rest of the
    checkpoint is not read.
    """
    from ddk_cache.head import extract_head

    found = extract_head(model, trust_remote_code=trust_remote_code, revision=revision)
    found.save(out)
    size = f"{found.vocab_size:,} × {found.hidden_size:,}"
    say(f"{out} holds the head of {model}: {size}, hash {found.hash()}")


@main.command()
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine.")
def info(cache: str, as_json: bool) -> None:
    """Show what CACHE contains: domains, rows, statistics of the teacher, bytes per token."""
    from ddk_cache.inspect.describe import describe, show
    from ddk_cache.read.pairs import open_parts

    with open_parts(cache) as parts:
        facts, *pairs = map(describe, parts)
    if as_json:
        click.echo(json.dumps({**facts, "pairs": pairs[0]} if pairs else facts, indent=1))
        return
    show(facts)
    for part in pairs:
        click.echo("\npairs of responses, two rows each:")
        show(part)


@main.command("show")
@click.argument("cache")
@click.option("--domain", required=True, help="Domain of the row.")
@click.option("--row", type=int, default=0, show_default=True,
              help="Number of the row in its split, counted from 0.")  # fmt: skip
@click.option("--split", type=Known("split", SPLITS), default=TRAIN, show_default=True,
              help="Split of the row.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine.")
def show_row(cache: str, domain: str, row: int, split: str, as_json: bool) -> None:
    """Print a row of CACHE as text, with what the loss counts marked.

    A terminal shows what is learned in bold, and control tokens in another color. Elsewhere
    « and » enclose what is learned.
    """
    from ddk_cache.inspect.show import read_pieces, show
    from ddk_cache.read.cache import open_cache

    with open_cache(cache, unfinished=True) as opened:
        pieces = read_pieces(opened, domain, split, row)
    if as_json:
        place = {"domain": domain, "split": split, "row": row}
        click.echo(json.dumps(place | {"pieces": [vars(piece) for piece in pieces]}, indent=1))
    else:
        show(pieces)


@main.command()
@click.argument("cache")
@click.option("--drop-bad", is_flag=True,
              help="Remove what is bad, so that 'build' makes just that again.")  # fmt: skip
@click.option("--part", metavar="N/M", default="1/1",
              help="Verify part N of M only; M processes share the work.")  # fmt: skip
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
    part: str,
    teacher: str | None,
    rows: int,
    seed: int,
    as_json: bool,
    model: str | None,
    head: str | None,
    **options: Any,
) -> None:
    """Hash every committed byte of CACHE and compare it with what was committed."""
    if drop_bad and teacher:
        raise InputError("--drop-bad and --teacher: use one at a time.")
    how = config_from(TeacherConfig, options)
    from ddk_cache.inspect import verify as verification
    from ddk_cache.read.pairs import open_pairs, open_parts

    some = verification.Part.parse(part)
    with open_parts(cache) as stores:
        opened, *pairs = stores
        total = sum(verification.bytes_to_hash(store, some) for store in stores)
        with Progress("verifying", total, "bytes") as progress:
            checked = [
                (store, verification.verify(store, progress.advance, some)) for store in stores
            ]
        problems = [problem for _, found in checked for problem in found]
        facts: dict[str, Any] = {"problems": [problem.text for problem in problems]}
        replayed = None
        if drop_bad:
            facts["removed"] = [
                name for store, found in checked for name in verification.drop_bad(store, found)
            ]
        elif teacher and not problems:
            replayed = run_again(opened, teacher, how, rows, seed, model=model, head=head)
            if replayed is None:
                return
            facts["replay"] = vars(replayed)
        if as_json:
            click.echo(json.dumps(facts, indent=1))
        else:
            show_verified(facts)
        if drop_bad and problems:
            also = " (for what is below pairs/, 'ddk-cache pair')" if pairs else ""
            say(f"Run the same 'ddk-cache build'{also} again to repair {cache}.")
            return
        verification.require_sound(opened, problems, replayed)
        try:
            opened.require_finished()
            if pairs:
                open_pairs(cache)
        except UnfinishedCacheError as error:
            say(str(error))


def run_again(
    cache: Cache, teacher: str, how: TeacherConfig, rows: int, seed: int, **served: Any
) -> Replay | None:
    """Compare a teacher with some rows of a cache; None in a process that only helps to run it."""
    from ddk_cache.inspect.verify import replay
    from ddk_cache.served.teacher import find_teacher

    spec, words = cache.spec, str(cache.tokenizer_path)
    served["vocab_size"] = spec.vocab_size
    loaded, _ = find_teacher(teacher, words, str(spec.targets), how, **served)
    with loaded.in_step() as first:
        return replay(cache, loaded, rows, seed) if first else None


def show_verified(facts: dict[str, Any]) -> None:
    """Print what verifying found."""
    from ddk_cache.inspect.describe import printable

    for text in facts["problems"][:50]:
        click.echo(f"BAD  {printable(text)}")
    for path in facts.get("removed", []):
        click.echo(f"removed  {printable(path)}")
    if found := facts.get("replay"):
        where = f"{found['rows']} rows of {', '.join(found['domains'])}"
        click.echo(
            f"teacher on {where}, nats: stored − live {found['stored_mean']:.2e} "
            f"(largest {found['stored_max']:.2e}); live − live {found['control_mean']:.2e} "
            f"(largest {found['control_max']:.2e}); limit for a row {found['limit']:.2e}"
        )
        for name in found["bad"][:20]:
            click.echo(f"BAD  {name}")
    if not facts["problems"]:
        click.echo("OK: all hashes match.")


for command in (sequences.generate, sequences.pair):
    main.add_command(command)
