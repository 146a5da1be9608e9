"""ddk-cache generate | pair: options and printing.

Files are looked for and options checked before anything heavy is imported.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from ddk_cache.console import config_from, options_from, say, show_logs
from ddk_cache.errors import InputError
from ddk_cache.models.config import TeacherConfig
from ddk_cache.options import HOW, PROCESSES, SERVED, options, which_process
from ddk_cache.sequences.config import SamplingConfig


@click.command()
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

    how = config_from(TeacherConfig, settings)
    config, sources = SamplingConfig(**settings), find_sources(prompts)
    rank, world = which_process(rank, world)
    show_logs(first=rank == 0)
    from ddk_cache.hf import load_tokenizer
    from ddk_cache.sequences.decode import load_responder
    from ddk_cache.sequences.generate import generate as write

    revision = None if tokenizer else how.revision
    words = load_tokenizer(
        tokenizer or teacher, trust_remote_code=how.trust_remote_code, revision=revision
    )
    responder = load_responder(teacher, words, how)
    write(sources, out, responder, config, rank=rank, world=world)
    if rank == 0:
        build = shlex.join(["ddk-cache", "build", str(out), "CACHE", "--teacher", teacher])
        say(f"{out} is finished. Cache the teacher's distributions on it:  {build}")


@click.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@click.argument("cache")
@click.option("--teacher", required=True,
              help="Model directory, hub id or http://host:port of a server.")  # fmt: skip
@click.option("--student", required=True, help="Model directory or hub id of the initial student.")
@click.option("--answers", type=click.Path(path_type=Path),
              help="Directory for the student's answers.  [default: CACHE.answers]")  # fmt: skip
@options([options_from(SamplingConfig, skip={"samples"})], HOW, SERVED, PROCESSES)
@click.option("--batch-rows", type=click.IntRange(1),
              help="Rows in one call to the teacher.  "
              "[default: as many as fit in memory]")  # fmt: skip
def pair(
    prompts: Path,
    cache: str,
    teacher: str,
    student: str,
    answers: Path | None,
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

    how = config_from(TeacherConfig, settings)
    config, sources = SamplingConfig(**settings), find_sources(prompts)
    if not answers and is_url(cache):
        raise InputError(f"{cache} is a URL. Give --answers, a local directory.")
    answers = answers or Path(f"{cache.rstrip('/')}.answers")
    rank, world = which_process(rank, world)
    place = {"rank": rank, "world": world}
    own = TeacherConfig(dtype=how.dtype, device=how.device, trust_remote_code=how.trust_remote_code)
    show_logs(first=rank == 0)
    from ddk_cache.hf import load_tokenizer
    from ddk_cache.read.cache import open_cache
    from ddk_cache.sequences.decode import load_responder
    from ddk_cache.sequences.pair import answer_prompts, build_pairs
    from ddk_cache.served.teacher import find_teacher

    with open_cache(cache) as opened:
        place_of_words = str(opened.tokenizer_path)
        words = load_tokenizer(place_of_words, trust_remote_code=how.trust_remote_code)
        writer = load_responder(student, words, own)
        answer_prompts(opened, sources, writer, answers, config, **place)
        del writer  # the teacher may need its memory
        served: dict[str, Any] = {"model": model, "head": head}
        served["vocab_size"] = opened.spec.vocab_size
        loaded, _ = find_teacher(teacher, place_of_words, "topk:1", how, **served)
        build_pairs(opened, sources, answers, loaded, words, batch_rows=batch_rows, **place)
    if rank == 0:
        train = f"ddk-train run {shlex.quote(cache)} RUN --student {shlex.quote(student)}"
        say(f"the pairs of {cache} are finished. Train from them:  {train} --pairs dpkd")
