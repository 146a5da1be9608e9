"""A build: the teacher's forward pass, extraction of targets, and what a whole build adds."""

from __future__ import annotations

import math
from typing import Any

import torch

from benches.build import extraction, whole
from benches.gpu.job import Job
from benches.material import letters
from benches.step import SIZES, make_model
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.teacher import Call, Teacher
from ddk_cache.format.spec import TargetSpec
from ddk_cache.testing import byte_tokenizer

SHAPES = {"1b": SIZES["1b"][0], "7b": SIZES["1b"][1], "tiny": (64, 2, 2, 128)}
"""Hidden, layers, heads, intermediate of the teachers."""

PLAN = [("1b", 32_000), ("1b", 151_936), ("7b", 151_936)]
"""Teacher and vocabulary."""

KINDS = ["topk:64", "sampled:24"]

ENTROPY = 2.7
"""Nats of the teacher's distributions, about those of a language model on text."""


def measure(job: Job) -> None:
    """Measure every teacher of the plan."""
    plan, seq_len, rows = ([("tiny", 512)], 64, 4) if job.tiny else (PLAN, 1024, 8)
    for shape, vocab in plan:
        title = f"teacher {shape}, vocabulary {vocab:,}"
        if job.time_for(title):
            measure_teacher(job, title, random_teacher(job, shape, vocab, seq_len), seq_len, rows)
            job.reset_peak()


def random_teacher(job: Job, shape: str, vocab: int, seq_len: int) -> Teacher:
    """Return a Llama of random weights, on a GPU in bfloat16.

    Its logits are about normal; their spread is set by the last norm so that a distribution has
    the entropy of text: the entropy of a softmax of normal logits is ln V − s²/2.
    """
    torch.manual_seed(0)
    model = make_model(SHAPES[shape], vocab, seq_len, str(job.device)).eval().requires_grad_(False)
    model = model.to(torch.bfloat16) if job.cuda else model
    spread = 0.02 * SHAPES[shape][0] ** 0.5
    model.model.norm.weight.fill_(math.sqrt(2 * (math.log(vocab) - ENTROPY)) / spread)

    def logits(tokens_BS: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(input_ids=tokens_BS, use_cache=False).logits
        return out

    return Teacher(logits, vocab, {"class": "random"}, shape, job.device, seq_len)


def measure_teacher(job: Job, title: str, teacher: Teacher, seq_len: int, rows: int) -> None:
    """Measure extraction, its memory, and a whole build of two shards."""
    repeats = 1 if job.tiny else 5
    parts = extraction(teacher, rows, KINDS, repeats, seq_len)
    for row, kind in zip(parts, KINDS, strict=True):
        row["added peak MiB"] = scored(job, teacher, kind, seq_len, rows)
    job.record.table(f"{title}: extraction, {rows} rows of {seq_len}", parts)
    for row in parts:
        if title.startswith(("teacher 1b", "teacher tiny")):
            job.goal(f"{title}: {row['targets']}, of forward", row["share"], most=0.05)
    built = [whole_build(job, teacher, kind, seq_len) for kind in KINDS]
    for part, row in zip(parts, built, strict=True):
        ratio = row.pop("ratio")
        each = 1e6 / row["build, tokens/s"]
        row["forward, %"] = 100 * part["forward, µs/token"] / each
        row["extraction, %"] = 100 * part["extraction, µs/token"] / each
        row["of forward and extraction"] = ratio
        job.goal(f"{title}: build with {row['targets']}, of the bare speed", ratio, least=0.97)
    job.record.table(f"{title}: a whole build", built)


def scored(job: Job, teacher: Teacher, kind: str, seq_len: int, rows: int) -> float:
    """Return the peak memory (MiB) that one call of the build adds to the teacher's weights.

    The call is `Teacher.scores`: where it takes the head in chunks, this shows what that saves.
    """
    tokens = torch.randint(256, (rows, seq_len + 1), device=job.device)
    chosen = torch.zeros(rows, dtype=torch.int64, device=job.device)
    offsets = torch.rand(rows, seq_len, dtype=torch.float64, device=job.device)
    asked = Call(tokens, chosen, TargetSpec.parse(kind), (), offsets)

    @torch.inference_mode()
    def call() -> None:
        teacher.scores(asked)

    before = job.reset_peak()
    call()
    peak = job.peak_mib(before)
    job.profiled(f"{teacher.name} {teacher.vocab_size} {kind}", call)
    return peak


def whole_build(job: Job, teacher: Teacher, kind: str, seq_len: int) -> dict[str, Any]:
    """Return the speed of a whole build against forward and extraction of the same rows."""
    folder = job.work / f"build-{teacher.name}-{teacher.vocab_size}-{kind.partition(':')[0]}"
    letters(folder / "corpus", 2**12 if job.tiny else 2**19)
    config = BuildConfig(seq_len=seq_len, targets=kind, batch_rows=8, holdout=0.0)
    return whole(folder, teacher, byte_tokenizer(), config, 1 if job.tiny else 2)
