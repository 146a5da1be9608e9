"""The speed of `verify` compared with plain reading and hashing of the same bytes."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import xxhash

from ddk_cache.build.writer import ShardWriter
from ddk_cache.format.audit_summary import MASS_BINS
from ddk_cache.format.commit import Record
from ddk_cache.format.manifest import Root, create_root, write_plan
from ddk_cache.format.plan import DomainPlan, Portion, ShardKey
from ddk_cache.format.spec import CacheSpec, TargetSpec
from ddk_cache.inspect.verify import THREADS, verify
from ddk_cache.read.cache import open_cache
from ddk_cache.storage.local import LocalStorage
from stress_tests.look import files_of
from stress_tests.report import Report, measurement


def make_large(root: Path, megabytes: int, seed: int) -> None:
    """Write a cache of random numbers of about that size."""
    spec = CacheSpec(
        seq_len=256,
        vocab_size=50_000,
        targets=TargetSpec("topk", 32),
        holdout=0.0,
        chunk_rows=16,
        shard_rows=512,
        logprob_step=2.0**-10,
        teacher={},
        tokenizer={},
    )
    inner = [(layout.dtype.itemsize, layout.inner) for layout in spec.arrays.values()]
    row = sum(size * int(np.prod(shape)) for size, shape in inner)
    count = max(1, megabytes * 10**6 // (row * spec.shard_rows))
    rows = {"train": count * spec.shard_rows, "validation": 0}
    root.mkdir()
    storage = LocalStorage(root)
    create_root(storage, Root(spec, 1, {"noise": {}}, {}))
    store, generator = ShardWriter(storage, spec), np.random.default_rng(seed)
    plan = DomainPlan((Portion(1, 1, "", rows),))
    plan = DomainPlan(plan.portions, store.metadata("noise", plan))
    store.restore_metadata(plan)
    write_plan(storage, spec, "noise", plan)
    for number in range(count):
        key = ShardKey("noise", "train", number)
        arrays = {
            name: generator.integers(0, 256**layout.dtype.itemsize, (512, *layout.inner))
            for name, layout in spec.arrays.items()
        }
        record = Record(
            key=key,
            fingerprint=spec.fingerprint,
            objects=store.write(key, arrays),
            content="",
            rows=512,
            positions=1,
            teacher_loss=1.0,
            batch_rows=1,
            audit={
                "positions": 512 * spec.seq_len,
                "correct": 0,
                "entropy": 0.0,
                "kept_mass": 0.0,
                "kept_mass_bins": [512 * spec.seq_len] + [0] * (MASS_BINS - 1),
                "largest_error": 0.0,
            },
        )
        record.write(storage)
    storage.clean_up()


def hash_plainly(path: Path) -> int:
    """Read and hash a file; return its size."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(4 * 2**20):
            state.update(piece)
        return file.tell()


@measurement
@click.option("--megabytes", default=400)
def speed(work: Path, seed: int, megabytes: int) -> Report:
    """Time verifying against hashing the same files plainly; it may take twice as long."""
    root = work / "large.zarr"
    make_large(root, megabytes, seed)
    paths, size = files_of(root), 0
    problems = verify(open_cache(root), lambda _: None)
    hashing, verifying = [], []
    for _ in range(3):
        began = time.monotonic()
        with ThreadPoolExecutor(THREADS) as pool:
            size = sum(pool.map(hash_plainly, paths))
        hashing.append(time.monotonic() - began)
        began = time.monotonic()
        problems += verify(open_cache(root), lambda _: None)
        verifying.append(time.monotonic() - began)
    plain, ours = statistics.median(hashing), statistics.median(verifying)
    report = Report({"megabytes": size // 10**6, "plain, MB/s": round(size / plain / 1e6)})
    report.figures |= {"verify, MB/s": round(size / ours / 1e6), "ratio": round(plain / ours, 2)}
    report.wrong = [problem.text for problem in problems]
    report.wrong += [] if plain / ours >= 0.5 else ["verifying is slower than half of hashing"]
    return report
