"""ddk-cache build | info | verify.

Options are checked, and files looked for, before anything heavy is imported, so that a mistake is
told at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ddk_cache.console import Commands, Known, Progress, say
from ddk_cache.schema import TargetSpec


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddk")
def main() -> None:
    """Pay for the teacher once: build and check caches of its next-token targets."""


@main.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--teacher", required=True, help="Model directory or hub id.")
@click.option("--tokenizer", help="Directory or hub id.  [default: the teacher's]")
@click.option("--seq-len", type=click.IntRange(1), default=1024, show_default=True,
              help="Positions in a row.")  # fmt: skip
@click.option("--targets", default="topk:64", show_default=True,
              help="What is kept of each distribution, kind:size.")  # fmt: skip
@click.option("--holdout", type=click.FloatRange(0, 1, max_open=True), default=0.05,
              show_default=True, help="Share of documents held out for measuring.")  # fmt: skip
@click.option("--dtype", type=Known("dtype", ["auto", "float32", "bfloat16", "float16"]),
              default="auto", show_default=True, help="Of the teacher.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 …")
@click.option("--batch-rows", type=click.IntRange(1),
              help="Rows in one call to the teacher.  [default: by memory]")  # fmt: skip
@click.option("--chunk-rows", type=click.IntRange(1),
              help="Rows in a chunk, the unit of reading.  [default: 4,096 tokens]")  # fmt: skip
@click.option("--shard-rows", type=click.IntRange(1),
              help="Rows in a shard, the unit of work.  [default: 262,144 tokens]")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def build(
    corpus: Path,
    cache: Path,
    teacher: str,
    tokenizer: str | None,
    targets: str,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    **settings: Any,
) -> None:
    """Run the teacher over CORPUS once and store its targets in CACHE.

    CORPUS is a directory in which each file or sub-folder is a domain, or a YAML mix file. A
    build that was stopped goes on by the same command.
    """
    from ddk_cache.corpus import find_sources

    TargetSpec.parse(targets)
    sources = find_sources(corpus, say)

    from ddk_cache.build import build
    from ddk_cache.pretrained import load_tokenizer
    from ddk_cache.teacher import load_teacher

    words = load_tokenizer(tokenizer or teacher)
    model = load_teacher(teacher, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    build(cache, sources, model, words, target_spec=targets, **settings)
    say(f"{cache} is finished. Train from it:  ddk-train run {cache} RUN --student …")


@main.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine.")
def info(cache: Path, as_json: bool) -> None:
    """Show what CACHE holds: domains, rows, the teacher's perplexity, bytes a token."""
    from ddk_cache.info import describe, show
    from ddk_cache.reader import open_cache

    facts = describe(open_cache(cache, unfinished=True))
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        show(facts)


@main.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine.")
def verify(cache: Path, as_json: bool) -> None:
    """Hash every committed byte of CACHE and compare it with what was committed."""
    from ddk_cache.reader import object_sizes, open_cache
    from ddk_cache.verify import verify

    opened = open_cache(cache, unfinished=True)
    with Progress("verifying", sum(object_sizes(opened).values()), "bytes") as progress:
        findings = verify(opened, progress.advance)
    problems = [problem for finding in findings for problem in finding.problems]
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        for domain in opened.domains:
            of = [f for f in findings if f.domain == domain]
            counted = ", ".join(f"{f.shards} {f.split}" for f in of)
            bad = sum(len(f.problems) for f in of)
            click.echo(f"{domain:24} {counted} shards: {f'{bad} BAD' if bad else 'good'}")
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:20])
        raise click.ClickException(f"{len(problems)} problems in {cache}:\n{listed}")
    opened.require_finished()
