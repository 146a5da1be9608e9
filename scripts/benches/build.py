"""The cost of a cache compared with its teacher: extraction, the head, and the whole build.

The teacher's forward pass alone, with extraction, and a whole build are timed over the same rows
in the same batches, in turn. A build may take little longer than forward and extraction: auditing,
compressing and writing run behind them, in a thread. A head in chunks is compared with all logits
in processes of their own, because the peak of a process's memory never falls.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from pyarrow import parquet

from benches.common import Record, data, json_option, middle, once, synchronize
from ddk_cache import TargetSpec
from ddk_cache.build import targets
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.build.teacher import Call, Teacher
from ddk_cache.format.layout import COMMITS
from ddk_cache.hf import load_tokenizer
from ddk_cache.models.body import BodyTeacher
from ddk_cache.models.load import load_teacher
from ddk_cache.read.cache import open_cache

SEQ_LEN = 256
BATCH_ROWS = 16
SHARD_ROWS = 64
"""Small shards, so that little of what is written is padding, as in a large cache."""

DOMAINS = ("c", "docs", "python")

LARGE = {
    "vocab_size": 50_000,
    "hidden_size": 768,
    "intermediate_size": 2_048,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "tie_word_embeddings": True,
}
"""A Llama of about 150 M parameters."""


def large_teacher() -> Teacher:
    """Return a teacher of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LARGE)).eval()
    size = sum(p.numel() for p in model.parameters())

    def logits(tokens_BS: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(input_ids=tokens_BS, use_cache=False).logits
        return out

    return Teacher(logits, 50_000, {}, f"{size / 1e6:.0f} M, random")


WIDE = {
    "vocab_size": 151_936,
    "hidden_size": 512,
    "intermediate_size": 1_408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
"""A Llama of which nearly everything is the vocabulary."""


def save_wide(folder: Path) -> Path:
    """Save a model of random weights with a large vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**WIDE)).save_pretrained(folder)
    return folder


def memory(name: str) -> int:
    """Return the memory of this process in bytes: VmRSS now, or VmHWM at its peak."""
    text = Path("/proc/self/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def scored(place: str, chunked: bool, kind: str, rows: int, repeats: int) -> dict[str, float]:
    """Return peak memory above the loaded model's, and tokens per CPU second.

    It is for a process of its own. CPU time differs less than time on a machine that others use.
    """
    teacher = load_teacher(place, device="cpu")
    assert isinstance(teacher, BodyTeacher)
    used = teacher if chunked else Teacher(teacher.logits, teacher.vocab_size, {})
    tokens = torch.randint(1000, (rows, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    offsets = torch.rand(rows, SEQ_LEN, dtype=torch.float64)
    chosen = torch.zeros(rows, dtype=torch.long)
    call = Call(tokens, chosen, TargetSpec.parse(kind), (), offsets)

    def score() -> None:
        with torch.inference_mode():
            used.scores(call)

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    score()
    peak = memory("VmHWM") - before
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        score()
        seconds.append(time.process_time() - began)
    return {"peak": peak, "speed": rows * SEQ_LEN / middle(seconds)}


def head_in_chunks(place: Path, kind: str, rows: int, repeats: int) -> dict[str, Any]:
    """Compare a head in chunks with all logits of the same batch."""
    spawn = multiprocessing.get_context("spawn")
    found = []
    for chunked in (False, True):
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            call = pool.submit(scored, str(place), chunked, kind, rows, repeats)
            found.append(call.result())
    whole, chunks = found
    return {
        "teacher": place.name,
        "targets": kind,
        "rows": rows,
        "all logits, MB": whole["peak"] / 1e6,
        "in chunks, MB": chunks["peak"] / 1e6,
        "memory ratio": whole["peak"] / chunks["peak"],
        "all logits, tokens/CPU-s": whole["speed"],
        "in chunks, tokens/CPU-s": chunks["speed"],
        "speed ratio": chunks["speed"] / whole["speed"],
    }


def extraction(
    teacher: Teacher, rows: int, kinds: list[str], repeats: int, seq_len: int = SEQ_LEN
) -> list[dict[str, Any]]:
    """Return the time of a forward pass, and of the extraction of each kind from its logits."""
    tokens, device = torch.randint(256, (rows, seq_len + 1), device=teacher.device), teacher.device
    labels = tokens[:, 1:]
    found: dict[str, list[float]] = {}
    with torch.inference_mode():
        logits = teacher.logits(tokens[:, :-1])
        calls: dict[str, Callable[[], object]] = {
            "forward": partial(teacher.logits, tokens[:, :-1])
        }
        for kind in kinds:
            calls[kind] = partial(targets.extract, logits, labels, TargetSpec.parse(kind))
        synchronize(str(device))
        for _ in range(repeats):
            for name, call in calls.items():
                found.setdefault(name, []).append(once(call, str(device)))
    forward = middle(found.pop("forward"))
    each = rows * seq_len
    return [
        {
            "teacher": teacher.name,
            "targets": kind,
            "forward, µs/token": forward / each * 1e6,
            "extraction, µs/token": middle(seconds) / each * 1e6,
            "share": middle(seconds) / forward,
        }
        for kind, seconds in found.items()
    ]


def bare(teacher: Teacher, tokens: torch.Tensor, kind: str, batch_rows: int) -> None:
    """Run forward and extraction over rows, and keep nothing."""
    spec = TargetSpec.parse(kind)
    with torch.inference_mode():
        for batch in tokens.to(teacher.device).split(batch_rows):
            logits = teacher.logits(batch[:, :-1])
            targets.extract(logits, batch[:, 1:], spec)
    synchronize(str(teacher.device))


def whole(
    folder: Path, teacher: Teacher, tokenizer: Any, config: BuildConfig, repeats: int
) -> dict[str, Any]:
    """Return the speed of a whole build against forward and extraction of the same rows.

    The rows are planned by a first build, which is not timed, so that both do the same work.
    """
    path, kind = folder / "cache.zarr", config.targets
    make = partial(build_cache, path, folder / "corpus", teacher, tokenizer, config)
    make()
    cache = open_cache(path)
    size = cache.manifest.root.batch_rows
    parts = [
        torch.from_numpy(cache.read(d, s, cache.row_numbers(d, s)).tokens)
        for d in cache.domains
        for s in ("train", "validation")
        if cache.plan(d).rows(s)
    ]
    alone, built = [], []
    for _ in range(repeats):
        alone.append(sum(once(partial(bare, teacher, part, kind, size)) for part in parts))
        shutil.rmtree(path / COMMITS)
        built.append(once(make))
    shutil.rmtree(path)
    count = sum(part[:, 1:].numel() for part in parts)
    return {
        "targets": kind,
        "tokens": count,
        "forward and extraction, tokens/s": count / middle(alone),
        "build, tokens/s": count / middle(built),
        "ratio": float(np.median(np.array(alone) / np.array(built))),
    }


@click.command()
@click.option("--kinds", default="topk:64,sampled:24", show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--documents", default=7, show_default=True, help="Documents per domain.")
@click.option(
    "--large/--no-large",
    default=True,
    show_default=True,
    help="Also a teacher of 150 M.",
)
@click.option("--head-rows", default=BATCH_ROWS, show_default=True, help="Rows of a head's call.")
@click.option("--head-only", is_flag=True, help="Only a head in chunks and all logits.")
@json_option
def main(
    kinds: str,
    repeats: int,
    documents: int,
    large: bool,
    head_rows: int,
    head_only: bool,
    json_path: Path | None,
) -> None:
    """Compare extraction with the forward pass, a head in chunks with all logits, a build with all.

    DDK_REAL_TEACHER names one more teacher for the head.
    """
    settings = {"kinds": kinds, "repeats": repeats, "documents": documents}
    settings |= {"threads": torch.get_num_threads(), "seq_len": SEQ_LEN, "rows": BATCH_ROWS}
    record = Record("build", settings, ["torch", "transformers", "zarr"])
    place, names = data() / "teacher", kinds.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        real = os.environ.get("DDK_REAL_TEACHER")
        wide = save_wide(Path(scratch) / "random, V = 151,936")
        teachers = [place, *([Path(real)] if real else []), wide]
        heads = [head_in_chunks(path, names[-1], head_rows, repeats) for path in teachers]
    record.table("a head in chunks compared with all logits", heads)
    if head_only:
        record.write(json_path)
        return
    teacher = load_teacher(str(place), device="cpu")
    rows = extraction(teacher, BATCH_ROWS, names, repeats)
    if large:
        rows += extraction(large_teacher(), 4, names, repeats)
    record.table("extraction compared with the forward pass", rows)
    tokenizer = load_tokenizer(str(place))
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        for name in DOMAINS:
            table = parquet.read_table(data() / f"corpus/{name}.parquet")
            parquet.write_table(table.slice(0, documents), corpus / f"{name}.parquet")
        same = BuildConfig(seq_len=SEQ_LEN, batch_rows=BATCH_ROWS, shard_rows=SHARD_ROWS)
        configs = [dataclasses.replace(same, targets=name) for name in names]
        built = [whole(Path(scratch), teacher, tokenizer, config, repeats) for config in configs]
    record.table("a build compared with forward and extraction", built)
    record.write(json_path)
