"""A tiny corpus, and caches of it built by processes that can be killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ddk_cache.errors import DDKError
from ddk_cache.hashing import digest
from ddk_cache.testing import BUILD, VOCAB, byte_tokenizer
from stress_tests.report import main

PATIENCE = 120.0
"""Seconds after which a builder is considered stuck."""

SCRIPT = Path(__file__).parent.parent / "stress.py"

Chance = random.Random


def make_corpus(folder: Path, documents: int, seed: int = 0) -> Path:
    """Write three domains of so many short documents each."""
    chance = Chance(seed)
    folder.mkdir(parents=True)
    for name, letters in (("letters", "abcde "), ("digits", "0123456789"), ("notes", "xyz ,.")):
        texts = ["".join(chance.choices(letters, k=45)) for _ in range(documents)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def build_cache(corpus: Path, cache: Path, delay: float, ready: Callable[[], Any]) -> None:
    """Build with a teacher that is a function of two matrices with a delay."""
    import torch

    from ddk_cache import BuildConfig, Teacher
    from ddk_cache.build import job

    generator = torch.Generator().manual_seed(0)
    into = torch.randn(VOCAB, 12, generator=generator)
    out = torch.randn(12, VOCAB, generator=generator)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        time.sleep(delay)
        return into[tokens] @ out

    tokenizer, teacher = byte_tokenizer(), Teacher(logits, VOCAB, {"class": "matrices"})
    ready()
    job.build_cache(cache, corpus, teacher, tokenizer, BuildConfig(**BUILD))


@main.command(hidden=True)
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--delay", type=float, default=0.0)
def worker(corpus: Path, cache: Path, delay: float) -> None:
    """Build CACHE: print a line after the imports, and begin at the next line of stdin."""

    def ready() -> None:
        click.echo("ready")
        sys.stdin.readline()

    build_cache(corpus, cache, delay, ready)


def start_worker(corpus: Path, cache: Path, delay: float = 0.0) -> subprocess.Popen[str]:
    """Start a builder, which waits."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "worker", str(corpus), str(cache), f"--delay={delay}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def run_worker(corpus: Path, cache: Path) -> tuple[int, str]:
    """Build in a process of its own; return its exit code and stderr."""
    process = start_worker(corpus, cache)
    _, err = process.communicate("\n", PATIENCE)
    return process.returncode, err


def make_cache(work: Path, documents: int, seed: int = 0) -> Path:
    """Build a cache of a corpus of its own."""
    corpus = make_corpus(work / f"corpus{seed}", documents, seed)
    code, err = run_worker(corpus, work / f"mix{seed}.zarr")
    if code:
        raise DDKError(f"the cache to stress could not be built: {err}")
    return work / f"mix{seed}.zarr"


def tree(root: Path) -> dict[str, str]:
    """Return everything below a directory, with a hash of what is in it."""
    return {
        str(path.relative_to(root)): digest(path.read_bytes()) if path.is_file() else "folder"
        for path in root.rglob("*")
    }


def differences(root: Path, right: Mapping[str, str]) -> list[str]:
    """Return the differences of a tree from the expected one."""
    found = tree(root)
    return [
        f"{name} is {'different' if name in found and name in right else 'missing or left over'}"
        for name in sorted({*found, *right})
        if found.get(name) != right.get(name)
    ]
