"""The share of the time that the workers of a Ray cluster spend outside of teacher and extraction.

    bench.py cluster [--workers 2] [--tokens 40000] [--teacher DIR] [--json FILE]

A Ray of this machine builds a cache of some domains. Each worker counts the seconds in which the
teacher runs and its targets are extracted, and those of the whole build from its first row on:
audits, compression, writing, leases and waiting for others are what else there is.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benches.common import Record, data, json_option
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.create import TRIAL
from ddk_cache.cluster.driver import Crew, cluster
from ddk_cache.cluster.order import Order
from ddk_cache.cluster.worker import Worker
from ddk_cache.errors import DDKError
from ddk_cache.format.plan import ShardKey
from ddk_cache.models.config import TeacherConfig

DOMAINS = ("c", "docs", "python")


class Clock:
    """Seconds of this thread by what it does; of nested parts the inner one counts."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._parts: list[str] = []
        self._since = 0.0

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose seconds are counted as those of a part."""

        def timed(*words: Any, **more: Any) -> Any:
            self._turn()
            self._parts.append(part)
            try:
                return work(*words, **more)
            finally:
                self._turn()
                self._parts.pop()

        return timed

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._parts:
            self.spent[self._parts[-1]] += now - self._since
        self._since = now


class Timed(Worker):
    """A worker that writes how long it took, into a folder beside the cache."""

    def build(self) -> DDKError | None:
        """Build, and write the seconds since the first row and those of each part."""
        from ddk_cache.build import job, share
        from ddk_cache.build.scoring import Scorer
        from ddk_cache.build.writer import ShardWriter
        from ddk_cache.format.codec import TargetCodec
        from ddk_cache.format.commit import Record
        from ddk_cache.storage.lease import Leases

        clock, began, begin = Clock(), 0.0, Scorer.begin

        def begun(scorer: Scorer, key: ShardKey, *words: Any) -> Callable[[], Any]:
            nonlocal began
            if key.domain != TRIAL and not began:
                clock.spent.clear()
                began = time.perf_counter()
            return clock.timed("teacher", begin(scorer, key, *words))

        Scorer.begin = clock.timed("teacher", begun)  # type: ignore[method-assign]
        parts: list[tuple[Any, str, str]] = [
            (ShardWriter, "read", "read"),
            (TargetCodec, "encode", "encode"),
            (job, "audit", "audit"),
            (ShardWriter, "write", "write"),
            (Record, "write", "commit"),
            (Leases, "take", "lease"),
            (Leases, "release", "lease"),
            (Leases, "beat", "lease"),
            (job.Scoring, "todo", "look"),
            (job.Scoring, "done", "look"),
            (share, "pause", "wait"),
        ]
        for owner, name, part in parts:
            setattr(owner, name, clock.timed(part, getattr(owner, name)))
        failure = super().build()
        seconds = time.perf_counter() - began
        place = Path(f"{self._order.cache}.{self._part[0]}.json")
        place.write_text(json.dumps({"seconds": seconds, **clock.spent}))
        return failure


@click.command(help=__doc__.splitlines()[0])
@click.option("--workers", default=2, show_default=True)
@click.option("--tokens", default=40_000, show_default=True, help="Tokens per domain.")
@click.option("--shard-rows", default=64, show_default=True, help="Rows of 256 tokens in a shard.")
@click.option("--teacher", help="Model directory.  [default: that of DDK_DATA]")
@json_option
def main(
    workers: int, tokens: int, shard_rows: int, teacher: str | None, json_path: Path | None
) -> None:
    """Build with several workers and compare their clocks."""
    import ray

    settings = {"workers": workers, "tokens": tokens, "shard_rows": shard_rows}
    record = Record("cluster", settings, ["ray", "torch", "transformers"])
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = data() / "corpus"
        domains = {d: {"path": str(corpus / f"{d}.parquet"), "tokens": tokens} for d in DOMAINS}
        (folder / "mix.yaml").write_text(json.dumps({"domains": domains}))
        order = Order(
            corpus=folder / "mix.yaml",
            cache=str(folder / "mix.zarr"),
            teacher=teacher or str(data() / "teacher"),
            tokenizer=None,
            config=BuildConfig(seq_len=256, batch_rows=16, shard_rows=shard_rows),
            how=TeacherConfig(device="cpu"),
            grow=False,
        )
        with cluster("local"):
            options = {"num_cpus": max(1.0, (os.cpu_count() or 1) // workers)}
            crew = Crew(order, workers, options)
            crew.actor = ray.remote(max_concurrency=2, **options)(Timed)
            crew.run()
        rows = []
        for rank in range(workers):
            clock = json.loads((folder / f"mix.zarr.{rank}.json").read_text())
            outside = 1 - clock["teacher"] / clock["seconds"]
            rows.append({"worker": rank, **clock, "outside": f"{outside:.1%}"})
    record.table("seconds since the first row, and with teacher and extraction", rows)
    record.write(json_path)
