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


class Timed(Worker):
    """A worker that writes how long it took, into a folder beside the cache."""

    def build(self) -> DDKError | None:
        """Build, and write the seconds since the first row and those in the scorer."""
        from ddk_cache.build.scoring import Scorer

        score, spent, began = Scorer.score, 0.0, 0.0

        def timed(scorer: Scorer, key: ShardKey, *words: Any) -> Any:
            nonlocal spent, began
            start = time.perf_counter()
            scored = score(scorer, key, *words)
            if key.domain != TRIAL:
                began = began or start
                spent += time.perf_counter() - start
            return scored

        Scorer.score = timed  # type: ignore[assignment, method-assign]
        failure = super().build()
        seconds = time.perf_counter() - began
        place = Path(f"{self._order.cache}.{self._part[0]}.json")
        place.write_text(json.dumps({"seconds": seconds, "teacher": spent}))
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
