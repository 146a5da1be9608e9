"""Random rows from a cache, compared with the bare limit and with other engines.

    bench.py read [--targets topk:64,sampled:12] [--json FILE]

Every engine is fed the same rows in the same order, one of each chunk, 32 at a time, so that
nothing read before helps and everything compressed in chunks is read as a whole. Each pass is a
process of its own: warm, with all files in the page cache and after rows of the other half of the
chunks, or cold, with the pages of all files dropped. CPU time is that of all threads and children.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benches.common import Record, json_option, middle
from ddk_cache.console import say
from ddk_cache.format.spec import TARGET_KINDS

BATCH = 32
"""Rows asked for at once."""

PASS = """
import sys
from benches.read import measure
measure(*sys.argv[1:])
"""

PACKAGES = (
    *("numpy", "numcodecs", "zarr", "tensorstore", "mosaicml-streaming", "litdata", "torch"),
)


def measure(engine: str, cache: str, copy: str, mode: str, seed: str) -> None:
    """Time one pass in this process and print its figures."""
    import resource

    from benches.engines import ENGINES, FIRST_EPOCH, drop_pages, remember
    from ddk_cache.read.cache import open_cache

    opened = open_cache(cache)
    rows, size = opened.plan(opened.domains[0]).rows("train"), opened.spec.chunk_rows
    reader = ENGINES[engine](Path(cache), Path(copy))

    choose = random.Random(int(seed))
    chosen = [first + choose.randrange(size) for first in range(0, rows, size)]
    choose.shuffle(chosen)
    half = len(chosen) // 2

    def run(rows: Sequence[int]) -> None:
        for first in range(0, len(rows), BATCH):
            reader.read(rows[first : first + BATCH])

    def spent() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    if mode == "warm":
        remember(Path(cache))
        remember(Path(copy))
        run(chosen[half:])
        if engine in FIRST_EPOCH:
            reader = ENGINES[engine](Path(cache), Path(copy))
    else:
        drop_pages(Path(cache))
        drop_pages(Path(copy))
    began, cpu = time.perf_counter(), spent()
    run(chosen[:half])
    tokens = half * opened.spec.seq_len
    seconds = time.perf_counter() - began
    print(json.dumps({"M tokens/s": tokens / seconds / 1e6, "us": 1e6 * (spent() - cpu) / tokens}))


def passes(engine: str, cache: Path, copy: Path, mode: str, repeats: int) -> dict[str, float]:
    """Return the medians of several passes."""
    figures = []
    for seed in range(repeats):
        words = [sys.executable, "-W", "ignore", "-c", PASS, engine, cache, copy, mode, seed]
        done = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, cwd=Path(__file__).parent.parent
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        figures.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: middle([figure[name] for figure in figures]) for name in figures[0]}


def compare(cache: Path, engines: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Measure every engine; for one that cannot be loaded, print the reason."""
    from benches.engines import ENGINES, clear

    rows: list[dict[str, Any]] = []
    for engine in engines:
        say(f"{cache.stem}: {engine} …")
        copy = cache.with_suffix(".copy")
        try:
            ENGINES[engine].prepare(cache, copy)
            warm = passes(engine, cache, copy, "warm", repeats)
            cold = passes(engine, cache, copy, "cold", repeats)
        except (ImportError, RuntimeError, OSError) as error:
            say(f"{engine}: not measured: {error}")
            continue
        finally:
            clear(copy)
        figures = {"CPU µs per token": warm["us"], "M tokens/s": warm["M tokens/s"]}
        rows.append({"engine": engine} | figures | {"M tokens/s cold": cold["M tokens/s"]})
    limits = [row["CPU µs per token"] for row in rows if row["engine"] == "bare limit"]
    return [
        row | {"÷ limit": row["CPU µs per token"] / limit} for row in rows for limit in limits
    ] or rows


@click.command(help=__doc__.splitlines()[0])
@click.option("--targets", default="topk:64,sampled:12", show_default=True, help="Kinds to read.")
@click.option("--copies", default=12, show_default=True, help="Copies of 262,144 tokens.")
@click.option("--repeats", default=3, show_default=True, help="Passes; medians are shown.")
@click.option("--engines", help="Which, joined by commas.  [default: all]")
@json_option
def main(
    targets: str, copies: int, repeats: int, engines: str | None, json_path: Path | None
) -> None:
    """Compare the engines on each kind of target."""
    from benches.engines import ENGINES
    from benches.material import Multiplied, built

    chosen = engines.split(",") if engines else list(ENGINES)
    record = Record("read", {"copies": copies, "batch": BATCH, "repeats": repeats}, PACKAGES)
    for kind in targets.split(","):
        if kind.partition(":")[0] not in TARGET_KINDS:
            say(f"{kind}: this version stores no such targets")
            continue
        with tempfile.TemporaryDirectory() as name:
            source = built(Path(name) / "source.zarr", kind, 2**18 + 2**13, 64)
            made = Multiplied(source, copies, Path(name) / f"{kind.replace(':', '-')}.zarr")
            made.place(range(made.count), link=False)
            record.table(f"random rows, {kind}", compare(made.out, chosen, repeats))
    record.write(json_path)
