"""The effect of the size of a cache: planning, opening, verifying, streaming; time and memory.

    bench.py scale [--shards 600] [--documents 100000] [--json FILE]

Each is measured at 1×, 10× and 100×, in processes of their own.

- Planning: a domain of so many documents of about 20 bytes. Its files are links to one file, so
  that ten million documents need no disk. Rows are written as always. Below 20,000 documents no
  shard is filled and memory is less, which says nothing about larger domains.
- Opening and streaming: caches of so many shards of 262,144 tokens; 60,000 are fifteen billion
  tokens. Every shard has its record and its place in the plan; only those that the measured steps
  touch have data, links to the shards of one small cache.
- Verifying: part 1/1, 1/10 and 1/100 of them, so that each verifies equally many shards.
- Opening from an object store: a local server of the same names, which answers after 30 ms with
  1,000 names at a time.
"""

from __future__ import annotations

import json
import os
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

FILE = 20_000
"""Documents in a file of the planned domain."""

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

VERIFY = """
import json, sys, time
from benches.scale import peak
from ddk_cache.read.cache import open_cache
from ddk_cache.inspect.verify import Part, bytes_to_hash, verify
cache, part, began = open_cache(sys.argv[1]), Part.parse(sys.argv[2]), time.perf_counter()
size = bytes_to_hash(cache, part)
problems = verify(cache, lambda _: None, part)
print(json.dumps({
    "GB": size / 1e9, "problems": len(problems), "seconds": time.perf_counter() - began,
    "peak MB": peak(),
}))
"""

PLAN = """
import json, sys, time
from pathlib import Path
from benches.scale import peak
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.tokenize import plan_domain
from ddk_cache.build.writer import ShardWriter
from ddk_cache.corpus.sources import find_sources
from ddk_cache.storage.local import LocalStorage
from ddk_cache.testing import byte_tokenizer
folder = Path(sys.argv[1])
(source,) = find_sources(folder / "corpus")
spec = BuildConfig(seq_len=1024).spec(300, {}, {})
began, tokenizer = time.perf_counter(), byte_tokenizer()
plan = plan_domain(
    ShardWriter(LocalStorage(folder / "mix.zarr"), spec), source, tokenizer, lambda _: None
)
seconds = time.perf_counter() - began
print(json.dumps({
    "documents": plan.documents, "tokens": plan.tokens, "seconds": seconds,
    "documents/s": plan.documents / seconds, "peak MB": peak(),
}))
"""


def resident() -> float:
    """Return the resident memory of this process in MB."""
    return _status("VmRSS")


def peak() -> float:
    """Return the largest resident memory that this process has had, in MB."""
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(name))


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


def run(code: str, *words: object, **environment: str) -> Mapping[str, float]:
    """Run a measurement in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        env=os.environ | environment,
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def planned(documents: int) -> Mapping[str, float]:
    """Plan a domain of so many documents."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        domain = folder / "corpus" / "tiny"
        domain.mkdir(parents=True)
        count = min(documents, FILE)
        lines = (json.dumps({"text": f"document {number:,}"}) + "\n" for number in range(count))
        (domain / "0.jsonl").write_text("".join(lines))
        for number in range(1, documents // FILE):
            (domain / f"{number}.jsonl").hardlink_to(domain / "0.jsonl")
        return run(PLAN, folder)


def opened_from_store(path: Path, shards: int) -> Mapping[str, float]:
    """Open a cache whose names an object store has."""
    from benches.listing import serving
    from benches.material import DOMAIN

    documents = [
        file
        for place in ("zarr.json", "plans", "tokenizer")
        for file in ([path / place] if place.endswith("json") else (path / place).iterdir())
    ]
    content = {f"mix.zarr/{file.relative_to(path)}": file.read_bytes() for file in documents}
    names = [f"mix.zarr/commits/{DOMAIN}/train/{number}.json" for number in range(shards)]
    names += [f"mix.zarr/domains/{DOMAIN}/train/tokens/c/{number}/0" for number in range(shards)]
    with serving([*names, *content], content) as (address, bucket):
        found = run(
            OPEN,
            "s3://b/mix.zarr",
            AWS_ENDPOINT_URL=address,
            AWS_ACCESS_KEY_ID="x",
            AWS_SECRET_ACCESS_KEY="x",
            AWS_REGION="us-east-1",
        )
        return {"requests": bucket.requests, **found}


@click.command(help=__doc__.splitlines()[0])
@click.option("--shards", default=600, show_default=True, help="Shards of the smallest cache.")
@click.option(
    "--documents", default=100_000, show_default=True, help="Documents of the smallest domain."
)
@click.option("--factors", default="1,10,100", show_default=True, help="Sizes to compare.")
@click.option("--steps", default=64, show_default=True, help="Steps; the second half is timed.")
@json_option
def main(shards: int, documents: int, factors: str, steps: int, json_path: Path | None) -> None:
    """Compare caches of several sizes."""
    from benches.material import Multiplied, built

    sizes = {"shards": shards, "documents": documents, "rows": ROWS, "steps": steps}
    record = Record("scale", sizes, ["numpy", "torch", "obstore"])
    tables: dict[str, list[dict[str, Any]]] = {}

    def add(title: str, size: dict[str, Any], figures: Mapping[str, float]) -> None:
        tables.setdefault(title, []).append({**size, **figures})

    for factor in map(int, factors.split(",")):
        say(f"planning {documents * factor:,} documents …")
        add("planning a domain", {"size": f"{factor}×"}, planned(documents * factor))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = built(folder / "source.zarr", "topk:64", 2**18 + 2**13, 256)
        for factor in map(int, factors.split(",")):
            say(f"making a cache of {shards * factor:,} shards …")
            made = Multiplied(source, shards * factor, folder / f"{factor}.zarr")
            part = set(range(0, made.count, factor))
            made.place(part | touched(made.out, steps), link=True)
            size = {"size": f"{factor}×", "shards": made.count}
            add("opening a cache", size, run(OPEN, made.out))
            add("opening it in an object store", size, opened_from_store(made.out, made.count))
            add("streaming from it", size, run(STREAM, made.out, steps))
            of = {"part": f"1/{factor}"}
            add("verifying a part of it", size | of, run(VERIFY, made.out, f"1/{factor}"))
    for title, rows in tables.items():
        record.table(title, rows)
    record.write(json_path)
