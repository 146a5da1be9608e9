"""ddk-cache copy | push | pull | import: options and printing.

Like `ddk_cache.cli`, to which the commands are added, it imports what is heavy when it is used.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ddk_cache.console import say
from ddk_cache.errors import InputError
from ddk_cache.storage.url import scheme_of


class Words(click.ParamType[tuple[str, ...]]):
    """Words with commas between them."""

    name = "words"

    def convert(
        self, value: str | tuple[str, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Return the words."""
        if isinstance(value, tuple):
            return value
        return tuple(word.strip() for word in value.split(",") if word.strip())


@click.command()
@click.argument("sources", nargs=-1, required=True)
@click.argument("target")
@click.option("--domains", type=Words(), default=(), metavar="A,B",
              help="Names of the domains to copy.  [default: all]")  # fmt: skip
@click.option("--splits", type=Words(), default=(), metavar="A,B",
              help="Splits to copy: train, validation.  [default: both]")  # fmt: skip
def copy(
    sources: tuple[str, ...], target: str, domains: tuple[str, ...], splits: tuple[str, ...]
) -> None:
    """Copy finished caches SOURCES, paths or URLs, to one cache TARGET.

    Nothing is decoded; every object is checked by its hash. Several sources must have the same
    spec and different domains. A copy that was stopped resumes with the same command.
    """
    from ddk_cache.transfer.copy import copy_cache

    copy_cache(sources, target, domains=domains, splits=splits)
    say(
        f"{target} is finished. Train from it:  ddk-train run {shlex.quote(target)} RUN --student …"
    )


@click.command()
@click.argument("cache")
@click.argument("url")
@click.option("--private", is_flag=True, help="Create the data set as a private one.")
def push(cache: str, url: str, private: bool) -> None:
    """Upload the finished CACHE to URL, hf://datasets/ORG/NAME/mix.zarr.

    The data set is created where there is none, and gets a card with what 'info' knows. Files that
    are there already are not sent again, so a push that was stopped resumes with the same command.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from ddk_cache.transfer.push import push_cache

    disable_progress_bars()
    push_cache(cache, url, private=private)
    say(f"{url} is finished: every file has the hash that was sent.")


@click.command()
@click.argument("url")
@click.argument("target", type=click.Path(path_type=Path))
def pull(url: str, target: Path) -> None:
    """Download a cache from the Hub, hf://datasets/ORG/NAME/mix.zarr, to the directory TARGET."""
    from ddk_cache.transfer.copy import copy_cache

    if scheme_of(url) != "hf":
        raise InputError(
            f"{url}: got another URL, expected hf://datasets/ORG/NAME[@REVISION]/mix.zarr. Use "
            "'ddk-cache copy' for other places."
        )
    copy_cache(url, target)
    say(f"{target} is finished.")


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("cache")
@click.option("--tokenizer", required=True, help="Tokenizer of the teacher: directory or hub id.")
@click.option("--domain", default="", help="Name of the domain.  [default: that of SOURCE]")
@click.option("--vocab-size", type=click.IntRange(1),
              help="Width of the teacher's output.  [default: size of the tokenizer]")  # fmt: skip
@click.option("--seq-len", type=click.IntRange(1), default=1024, show_default=True,
              help="Positions in a row.")  # fmt: skip
@click.option("--holdout", type=float, default=0.05, show_default=True,
              help="Share of documents held out for measuring gaps.")  # fmt: skip
def import_(
    source: Path,
    cache: str,
    tokenizer: str,
    domain: str,
    vocab_size: int | None,
    seq_len: int,
    holdout: float,
) -> None:
    """Make a CACHE of one domain from SOURCE, a teacher's log-probabilities written by others.

    SOURCE is a file or folder of Parquet or JSON lines: with input_ids, target_token_ids and
    target_logprobs (axolotl, TRL), with prompt_token_ids and prompt_logprobs (vLLM), or with the
    packed columns of DistillKit.
    """
    from ddk_cache.build.config import BuildConfig

    config = BuildConfig(seq_len=seq_len, holdout=holdout)
    from ddk_cache.hf import load_tokenizer
    from ddk_cache.transfer.imported import import_cache

    words = load_tokenizer(tokenizer)
    import_cache(source, cache, words, config, domain=domain, vocab_size=vocab_size)
    say(f"{cache} is finished. Look at it:  ddk-cache info {shlex.quote(cache)}")
