"""ddk-train run | report | cut.

Options mirror `TrainConfig` field by field; a test holds the two together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ddk_cache.console import Commands, Known, say
from ddk_train.config import OPTIMIZERS, PRECISIONS, SCHEDULES, TrainConfig
from ddk_train.weights import RULES

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULTS = {name: field.default for name, field in TrainConfig.__dataclass_fields__.items()}


def setting(name: str, help: str, type: Any = None) -> Callable[[Command], Command]:
    """Return an option with the name and default of a field of `TrainConfig`."""
    option, default = "--" + name.replace("_", "-"), DEFAULTS[name]
    flag = default is False
    return click.option(
        option, default=default, is_flag=flag, show_default=not flag, help=help, type=type
    )


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddk")
def main() -> None:
    """Spend the cache many times: train students from it, and look at how they did."""


@main.command()
@click.argument("cache")
@click.argument("run")
@click.option("--student", required=True,
              help="Model directory, hub id, or the config.json of a fresh student.")  # fmt: skip
@setting("shard_cache", "Directory that keeps whole shards of a cache in an object store.")
@setting("shard_cache_size", "Bytes that it may take.")
@setting("weighting", "How domains are weighted.", Known("weighting", RULES))
@setting("alpha", "Smoothing of the weights: the share that follows the gaps.")
@setting("weights", "Of --weighting fixed, for every domain: code=0.5,web=0.3,…")
@setting("interval", "Steps between two measurements of the gaps.")
@setting("eval_rows", "Held-out rows of each domain to measure on.")
@setting("forgetting", "Nats that a domain's loss may rise above its best before a warning.")
@setting("gamma", "Weight of the divergence from the teacher.")
@setting("loss", "forward_kl, reverse_kl, jsd:BETA or skew_kl:ALPHA.")
@setting("temperature", "Of the divergence; the cache has to declare one that is not 1.")
@setting("steps", "Optimizer steps.")
@setting("rows", "Rows in a step.")
@setting("micro_rows", "Rows in one forward pass; 0 is all of a step.")
@setting("lr", "Highest learning rate.")
@setting("min_lr", "Where the schedule ends, as a share of --lr.")
@setting("warmup", "Steps of warm-up, at most a tenth of the run.")
@setting("schedule", "How the learning rate falls.", Known("schedule", SCHEDULES))
@setting("decay", "Share of the run over which wsd falls.")
@setting("optimizer", "8-bit states need bitsandbytes.", Known("optimizer", OPTIMIZERS))
@setting("weight_decay", "AdamW's decay of matrices.")
@setting("beta2", "AdamW's second moment.")
@setting("clip", "Largest norm of the gradient.")
@setting("lora_rank", "Train a LoRA adapter of this rank; 0 trains the student itself.")
@setting("keep_adapter", "Leave the adapter by itself at the end, not merged.")
@setting("seed", "Of the data order and of a fresh student's weights.")
@setting("device", "auto, cpu, cuda, cuda:1 …")
@setting("precision", "auto is bf16 where CUDA has it.", Known("precision", PRECISIONS))
@setting("gradient_checkpointing", "Less memory, a third more time.")
@setting("compile", "Compile the student with torch.compile.")
@setting("checkpoint_every", "Steps between checkpoints; 0 is the interval.")
@setting("keep", "Newest checkpoints kept; the best is kept beside them.")
@setting("patience", "Measurements without a lower loss that end the run; 0 is no end.")
@setting("new_rows", "When resumed from a cache that has grown: take the new rows too.")
@setting("log_every", "Steps between two lines of metrics.")
@setting("report_to", "Trackers beside metrics.jsonl: tensorboard, wandb, … joined by commas.")
def run(**settings: Any) -> None:
    """Train a student from CACHE into the directory RUN, or go on with a run that stopped."""
    config = TrainConfig(**settings)
    from ddk_cache import open_cache

    open_cache(config.cache)

    from ddk_train.report.run_report import load
    from ddk_train.report.table import show
    from ddk_train.trainer import train

    finished = train(config)
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes speaks
    show(load([finished.path]))
    say(f"the student is in {finished.student}; look at the run:  ddk-train report {config.run}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path),
              help="Where to write the page.  [default: report.html in the first run]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine instead.")
def report(runs: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Show runs as a table, and draw them on one page, side by side."""
    from ddk_train.report.page import write_page
    from ddk_train.report.run_report import load, to_json
    from ddk_train.report.table import show

    reports = load(list(runs))
    if as_json:
        click.echo(json.dumps(to_json(reports), indent=1))
        return
    show(reports)
    page = html or runs[0] / "report.html"
    write_page(reports, page)
    click.echo(f"page: {page}")


@main.command()
@click.argument("teacher")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", help="Layers to keep, counted from 0, for example 0,3,6.")
@click.option("--keep", type=int, help="Number of layers to keep, evenly spaced, first and last "
              "included.")  # fmt: skip
def cut(teacher: str, out: Path, layers: str | None, keep: int | None) -> None:
    """Save a student of some layers of TEACHER, a directory or hub id, in OUT."""
    from ddk_train.cut import cut_student, parse_layers

    cut_student(teacher, out, layers=parse_layers(layers) if layers else None, keep=keep)
    say(f"the student is in {out}; train it:  ddk-train run CACHE RUN --student {out}")
