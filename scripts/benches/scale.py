"""The effect of the size of a cache: time to open it, memory, time per step.

    bench.py scale [--shards 600] [--json FILE]

Caches of 1×, 10× and 100× as many shards of 262,144 tokens; 60,000 are fifteen billion tokens.
Every shard has its record and its place in the plan; only those that the measured steps touch
have data, links to the shards of one small cache. Each size is measured in processes of its own:
one opens the cache, one streams stored rows in the training order into one step's memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benches.common import Record, json_option
from ddk_cache.console import say

ROWS = 32
"""Rows per step."""

OPEN = """
import json, sys, time
from benches.scale import resident
from ddk_cache.read.cache import open_cache
before, began = resident(), time.perf_counter()
cache = open_cache(sys.argv[1])
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "MB before": before, "MB open": resident()}))
"""

STREAM = """
import json, sys, time
from benches.scale import ROWS, mixture, resident
from ddk_cache.read.cache import open_cache
cache, steps = open_cache(sys.argv[1]), int(sys.argv[2])
order, out = mixture(cache), cache.buffers(ROWS)
for step in range(steps):
    if step == steps // 2:
        began, cpu = time.perf_counter(), time.process_time()
    draw = order.next(order.sizes / order.sizes.sum())
    cache.fill("train", [cache.domains[n] for n in draw.domain], draw.row, out)
steps -= steps // 2
print(json.dumps({
    "ms per step": 1e3 * (time.perf_counter() - began) / steps,
    "CPU ms per step": 1e3 * (time.process_time() - cpu) / steps,
    "MB": resident(),
}))
"""


def resident() -> float:
    """Return the resident memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


def mixture(cache: Any) -> Any:
    """Return the training order of a cache."""
    from ddk_train.data.mixture import Mixture

    extents = {name: cache.extents(name, "train") for name in cache.domains}
    return Mixture(extents, chunk_rows=cache.spec.chunk_rows, rows=ROWS, seed=0)


def touched(path: Path, steps: int) -> set[int]:
    """Return the shards that the first steps of training read."""
    from ddk_cache.read.cache import open_cache

    cache = open_cache(path)
    order = mixture(cache)
    draws = [order.next(order.sizes / order.sizes.sum()) for _ in range(steps)]
    return {int(row) // cache.spec.shard_rows for draw in draws for row in draw.row}


def run(code: str, *words: object) -> Mapping[str, float]:
    """Run a measurement in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


@click.command(help=__doc__.splitlines()[0])
@click.option("--shards", default=600, show_default=True, help="Shards of the smallest cache.")
@click.option("--factors", default="1,10,100", show_default=True, help="Sizes to compare.")
@click.option("--steps", default=64, show_default=True, help="Steps; the second half is timed.")
@json_option
def main(shards: int, factors: str, steps: int, json_path: Path | None) -> None:
    """Compare caches of several sizes."""
    from benches.material import Multiplied, built

    record = Record("scale", {"shards": shards, "rows": ROWS, "steps": steps}, ["numpy", "torch"])
    opened, streamed = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = built(folder / "source.zarr", "topk:64", 2**18 + 2**13, 256)
        for factor in map(int, factors.split(",")):
            say(f"making a cache of {shards * factor:,} shards …")
            made = Multiplied(source, shards * factor, folder / f"{factor}.zarr")
            made.place(touched(made.out, steps), link=True)
            size = {"size": f"{factor}×", "shards": made.count}
            opened.append(size | dict(run(OPEN, made.out)))
            streamed.append(size | dict(run(STREAM, made.out, steps)))
    record.table("opening a cache", opened)
    record.table("streaming from it", streamed)
    record.write(json_path)
