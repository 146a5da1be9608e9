"""A training step: cross-entropy of two libraries, ours from the cache, dense and live KD."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from textwrap import shorten
from typing import Any

from benches.common import middle
from benches.gpu.job import Job, peak_flops
from benches.step import (
    BASELINES,
    SIZES,
    Material,
    Setting,
    head_alone,
    step,
    teacher_forward,
    variants,
)
from ddk_train.loss import head as heads

SEQ_LEN = 2048

PLAN = [
    (student, vocab, rows)
    for student in ("0.1b", "0.5b", "1b")
    for vocab in (32_000, 151_936)
    for rows in (4, 16)
]
"""Student, vocabulary, rows of 2,048 positions: 8 k and 32 k positions per step."""

CACHED = ("cache, top-64", "cache, sampled-12")

REPEATS = 3

HEAD = (32_768, 128_256)
"""Positions and vocabulary of the head alone."""

CHUNKS = [2**power for power in range(26, 31)]
"""Bytes of logits in a chunk of the fused loss, to find the best."""


def measure(job: Job) -> None:
    """Measure every setting of the plan, then the head alone."""
    plan, positions = ([("tiny", 512, 2)], (64, 512)) if job.tiny else (PLAN, HEAD)
    for student, vocab, rows in plan:
        title = f"student {student}, vocabulary {vocab:,}, {rows} rows"
        if job.time_for(title):
            measured(job, title, make_setting(job, student, vocab, rows))
    if job.time_for("the head alone"):
        measure_head(job, *positions)


def make_setting(job: Job, student: str, vocab: int, rows: int) -> Setting:
    """Return a setting; long steps of large students recompute their activations."""
    return Setting(
        student=student,
        vocab=vocab,
        rows=rows,
        seq_len=32 if job.tiny else SEQ_LEN,
        device=str(job.device),
        bf16=job.cuda,
        gradient_checkpointing=rows > 4 and student != "0.1b",
        compiled=job.cuda,
    )


def measured(job: Job, title: str, setting: Setting) -> None:
    """Measure the variants of a setting, one after another, so that each has its own peak."""
    if not job.cuda or "CE, Liger" not in variants(setting):
        job.leave_out(f"{title}: Liger's cross-entropy, which needs CUDA and liger-kernel")
    material, rows = Material(setting), []
    for name in variants(setting):
        before = job.reset_peak()
        row: dict[str, Any] = {"variant": name}
        try:
            seconds = middle([step(material, name) for _ in range(REPEATS + 2)][2:])
        except (RuntimeError, ImportError) as error:  # out of memory, or a compiler is missing
            material.optimizer.zero_grad(set_to_none=True)
            rows.append(row | {"note": shorten(str(error), 80)})
            continue
        row |= {"s per step": seconds, "tokens/s": material.positions / seconds}
        row["FLOP utilization, %"] = utilization(job, setting, material, seconds)
        row["peak MiB"] = job.peak_mib()
        row["added MiB"] = job.peak_mib(before)
        rows.append(row)
        job.profiled(f"{title} {name}", partial(step, material, name))
    forward = math.nan
    if "note" not in rows[-1]:  # the live teacher is in memory
        forward = middle([teacher_forward(material) for _ in range(REPEATS)])
    compare(job, title, rows, forward)


def utilization(job: Job, setting: Setting, material: Material, seconds: float) -> float:
    """Return the student's model operations per second, % of the device's; NaN where unknown.

    Six per weight and token, the tied embedding counted once, and causal attention.
    """
    hidden, layers, _, _ = SIZES[setting.student][0]
    weights = sum(p.numel() for p in material.student.parameters())
    each = 6 * weights + 6 * layers * hidden * setting.seq_len
    peak = peak_flops(job.device)
    return 100 * each * material.positions / seconds / peak if peak else math.nan


def compare(job: Job, title: str, rows: list[dict[str, Any]], forward: float) -> None:
    """Show the rows and compare them with the goals."""
    seconds = {row["variant"]: row["s per step"] for row in rows if "note" not in row}
    memory = {row["variant"]: row["peak MiB"] for row in rows if "note" not in row}
    best = min((seconds[name] for name in BASELINES if name in seconds), default=math.nan)
    for row in rows:
        row["of best CE"] = seconds.get(row["variant"], math.nan) / best
    job.record.table(title, rows)
    ours = [name for name in CACHED if name in seconds]
    for name in ours:
        job.goal(f"{title}: {name}, of the better CE", seconds[name] / best, most=1.03)
    least = min((memory[n] for n in ("CE, fused", "CE, Liger") if n in memory), default=math.nan)
    for name in ours:
        job.goal(f"{title}: {name}, peak of fused CE", memory[name] / least, most=1.02)
    if "live KD" in seconds and ours:
        cached = seconds[ours[0]]
        bound = 0.9 * (1 + forward / cached)
        job.record.table(f"{title}: live teacher", [{"teacher forward, s": forward}])
        job.goal(f"{title}: live KD of {ours[0]}", seconds["live KD"] / cached, least=bound)


# --- the head alone ---


def measure_head(job: Job, positions: int, vocab: int) -> None:
    """Measure the head alone, eager and compiled, and compiled in chunks of several sizes."""
    compiled = make_setting(job, "tiny" if job.tiny else "0.5b", vocab, 1)
    rows = []
    for setting in (replace(compiled, compiled=False), compiled):
        for row in head_alone(setting, positions, REPEATS):
            rows.append(row | {"compiled": str(setting.compiled)})
    title = f"head alone, {positions:,} positions, vocabulary {vocab:,}"
    job.record.table(title, rows)
    job.goal(f"{title}: added peak, MiB", rows[-1].get("added peak MiB", math.nan), most=2048)
    sizes = [2**14] if job.tiny else CHUNKS
    by_chunk = []
    for size in sizes:
        with chunks_of(job.device.type, size):
            row = head_alone(compiled, positions, REPEATS)[-1]
        by_chunk.append({"MiB per chunk": size / 2**20} | row)
    job.record.table(f"{title}, by chunk", by_chunk)


@contextmanager
def chunks_of(kind: str, size: int) -> Iterator[None]:
    """Let the fused loss use chunks of so many bytes on a kind of device."""
    before = heads.CHUNK_BYTES[kind]
    heads.CHUNK_BYTES[kind] = size
    try:
        yield
    finally:
        heads.CHUNK_BYTES[kind] = before
