"""Whether a student ever waits: real steps of the trainer, with 1, 2 and 4 threads that read."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from benches.gpu.job import Job
from benches.material import SEQ_LEN, VOCAB, Multiplied, built
from benches.step import SIZES
from ddk_cache import open_cache
from ddk_train import TrainConfig
from ddk_train.data.loader import Loader
from ddk_train.data.mixture import Mixture
from ddk_train.distributed import Processes
from ddk_train.job import assemble
from ddk_train.run.directory import Run
from ddk_train.trainer import Trainer

KINDS = ("topk:64", "sampled:24")
THREADS = (1, 2, 4)


def measure(job: Job) -> None:
    """Measure each kind of target and number of threads."""
    kinds, threads = (KINDS[1:], THREADS[1:2]) if job.tiny else (KINDS, THREADS)
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        if not job.time_for(f"reading {kind}"):
            continue
        cache = make_cache(job, kind)
        trainer = open_trainer(job, cache)
        trainer.loader.close()
        for count in threads:
            rows.append({"targets": kind, "threads": count} | waited(job, trainer, count))
    job.record.table("share of a step that waits for its batch", rows)
    for row in rows:
        if row["threads"] == 2:  # what the trainer uses
            job.goal(f"{row['targets']}: waiting, %", row["waiting, %"], most=1.0)


def make_cache(job: Job, kind: str) -> Path:
    """Build a cache of synthetic rows and repeat its shards, as copies on the local disk."""
    tokens, shard_rows, times = (2**14, 8, 1) if job.tiny else (2**18 + 2**13, 64, 16)
    name = kind.replace(":", "-")
    source = built(job.work / f"{name}-source.zarr", kind, tokens, shard_rows)
    made = Multiplied(source, times, job.work / f"{name}.zarr")
    made.place(range(made.count), link=False)
    return made.out


def open_trainer(job: Job, cache: Path) -> Trainer:
    """Return the trainer of a fresh student of 0.1 B parameters."""
    hidden, layers, heads, intermediate = (64, 2, 2, 128) if job.tiny else SIZES["0.1b"][0]
    student = cache.with_suffix(".json")
    student.write_text(
        json.dumps(
            {
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB,
                "hidden_size": hidden, "intermediate_size": intermediate,
                "num_hidden_layers": layers, "num_attention_heads": heads,
                "num_key_value_heads": heads, "max_position_embeddings": SEQ_LEN,
            }
        )
    )  # fmt: skip
    config = TrainConfig(
        cache=str(cache), run=str(cache.with_suffix(".run")), student=str(student),
        weighting="uniform", device=str(job.device), rows=2 if job.tiny else 32,
    )  # fmt: skip
    return assemble(config, Processes(config), Run(Path(config.run)))


def waited(job: Job, trainer: Trainer, threads: int) -> dict[str, float]:
    """Return the share of steps spent waiting, after some that are not counted."""
    warm, steps = (1, 3) if job.tiny else (20, 150)
    cache = open_cache(trainer.config.cache)
    extents = {name: cache.extents(name, "train") for name in cache.domains}
    mixture = Mixture(
        extents, chunk_rows=cache.spec.chunk_rows, rows=trainer.config.rows, seed=threads
    )
    found = []
    with closing(Loader(cache, mixture, trainer.processes.device, threads=threads)) as loader:
        for batch in loader.batches(loader.weights, warm + steps):
            before = trainer.state.seconds
            metrics = trainer.step(batch)
            found.append((trainer.state.seconds - before, metrics["wait"], batch.wait))
    seconds = sum(time for time, *_ in found[warm:])
    wait = sum(time for *_, time in found[warm:])
    tokens = trainer.config.rows * cache.spec.seq_len * steps
    return {
        "tokens/s": tokens / seconds,
        "waiting, %": 100 * wait / seconds,
        "longest wait, % of its step": 100 * max(share for _, share, _ in found[warm:]),
    }
