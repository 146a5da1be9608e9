"""The record on a GPU, in parts of a few minutes.

    bench.py gpu [--part NAME] [--minutes M] --json FILE [--device cuda] [--tiny] [--profile DIR]

Each part makes what it needs on the spot and prints its goals next to what it found; what time did
not allow is named. `--device cpu --tiny` runs the same lines in seconds, so that a bench written
without a GPU does not fail on the first minute of one; its figures mean nothing.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import click

from benches.common import Record, json_option
from benches.gpu.job import PACKAGES, Job, device_facts
from ddk_cache import DDKError
from ddk_cache.console import say
from ddk_cache.hf import pick_device

PARTS = ("check", "step", "build", "read", "student")
"""Modules of this folder; each has `measure(job)`."""


@click.command(help=__doc__.splitlines()[0])
@click.option(
    "--part", "parts", type=click.Choice(PARTS), multiple=True, help="Run it alone; repeatable."
)
@click.option(
    "--minutes",
    default=8.0,
    show_default=True,
    help="Time after which a part begins nothing new (minutes).",
)
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:N or cpu.")
@click.option("--tiny", is_flag=True, help="Run the smallest sizes; the figures mean nothing.")
@click.option(
    "--profile",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write tables and traces of torch.profiler to this directory (parts step and build).",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the runs of part student in this directory and resume them.",
)
@json_option
def main(parts: tuple[str, ...], json_path: Path | None, **options: Any) -> None:
    """Measure everything that needs a GPU."""
    device = pick_device(options["device"])
    done: list[dict[str, Any]] = []
    failed: list[str] = []
    for name in parts or PARTS:
        measure = importlib.import_module(f"benches.gpu.{name}").measure
        record = Record(f"gpu {name}", options, PACKAGES)
        facts = device_facts(device)
        record.console.print("device: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
        end = time.monotonic() + 60 * options["minutes"]
        with tempfile.TemporaryDirectory() as scratch:
            work = (options["work"] or Path(scratch)).resolve()
            job = Job(record, device, options["tiny"], end, work, options["profile"])
            try:
                measure(job)
            except Exception:  # time on a GPU is dear: the other parts still run
                failed.append(name)
                record.facts["error"] = traceback.format_exc()
                say(record.facts["error"])
            job.conclude()
        done.append(record.facts | {"device": facts, "left out": job.left_out})
        if json_path:  # after each part: a later one may be cut short
            json_path.write_text(json.dumps(done, indent=1, default=str) + "\n")
    if failed:
        raise DDKError(f"failed: {', '.join(failed)}. The errors are shown above.")
