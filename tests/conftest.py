"""Material for the tests: a byte tokenizer, a corpus of three domains, a teacher, a cache.

Everything is small and real: real files, a real tokenizer, a real Llama of a few thousand weights.
Tests on the shared corpus read its place from DDK_DATA and skip, saying so, where it is unset.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_cache.build.job import build
from ddk_cache.build.teacher import Teacher
from ddk_cache.corpus.sources import find_sources
from ddk_cache.read.cache import Cache, open_cache
from ddk_cache.testing import BUILD as BUILD
from ddk_cache.testing import VOCAB as VOCAB
from ddk_cache.testing import byte_tokenizer as byte_tokenizer
from ddk_train import TrainConfig
from tests.s3 import Server

RUN: dict[str, Any] = {
    "steps": 12,
    "interval": 4,
    "checkpoint_every": 3,
    "rows": 6,
    "micro_rows": 4,
    "eval_rows": 5,
    "lr": 3e-3,
    "log_every": 1,
    "keep": 99,
}
"""Settings of a run of a few seconds, with a ragged last micro batch."""

Configure = Callable[..., TrainConfig]


def random_teacher(seed: int = 0, scale: float = 1.0) -> Teacher:
    """Return a teacher that is a function of two small matrices."""
    generator = torch.Generator().manual_seed(seed)
    into = torch.randn(VOCAB, 12, generator=generator)
    out = torch.randn(12, VOCAB, generator=generator) * scale
    return Teacher(lambda tokens: into[tokens] @ out, VOCAB, {"class": "random", "seed": str(seed)})


def write_corpus(folder: Path) -> Path:
    """Write three domains in three formats."""
    folder.mkdir(parents=True)
    words = random.Random(0)

    def text(letters: str, length: int) -> str:
        return "".join(words.choice(letters) for _ in range(length))

    with gzip.open(folder / "letters.jsonl.gz", "wt") as file:
        for _ in range(40):
            file.write(json.dumps({"text": text("abcde ", 50)}) + "\n")
    rows = "".join(f'"{text("0123456789", 30)}",x\n' for _ in range(30))
    (folder / "digits.csv").write_text("text,other\n" + rows)
    (folder / "notes").mkdir()
    for number in range(20):
        (folder / "notes" / f"{number:02}.txt").write_text(text("xyz\n ", 60))
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="session")
def make_cache(corpus: Path, tokenizer: Any) -> Callable[..., Cache]:
    def make(path: str | Path, **settings: Any) -> Cache:
        teacher = settings.pop("teacher", random_teacher())
        words = settings.pop("tokenizer", tokenizer)
        build(path, find_sources(corpus), teacher, words, **BUILD | settings)
        return open_cache(path)

    return make


@pytest.fixture(scope="session")
def cache(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A finished cache; nobody may change it."""
    return make_cache(tmp_path_factory.mktemp("cache") / "mix.zarr")


def llama_config(**settings: Any) -> dict[str, Any]:
    """Return the config of a Llama of a few thousand weights."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
    } | settings


@pytest.fixture(scope="session")
def student_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "config.json"
    path.write_text(json.dumps(llama_config()))
    return path


@pytest.fixture
def configure(cache: Cache, student_config: Path, tmp_path: Path) -> Configure:
    def configure(run: str = "run", **changes: Any) -> TrainConfig:
        paths = {
            "cache": str(cache.root),
            "run": str(tmp_path / run),
            "student": str(student_config),
        }
        return TrainConfig(**paths | RUN | changes)

    return configure


@pytest.fixture(scope="session")
def teacher_dir(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face model directory with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("teacher") / "teacher"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**llama_config(hidden_size=32))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An S3 server with an empty bucket, and the environment that leads there."""
    pytest.importorskip("obstore")
    for package in ("moto", "flask_cors"):
        pytest.importorskip(package, reason="needs moto[s3], flask and flask-cors")
    made = Server()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.port}")
    yield made
    made.close()


@pytest.fixture(scope="session")
def data() -> Path:
    """The shared corpus and teacher."""
    place = os.environ.get("DDK_DATA")
    if not place:
        pytest.skip("DDK_DATA is unset: it names a folder with corpus/ and teacher/")
    return Path(place)


def tree(root: Path) -> dict[str, bytes]:
    """Return every file below a directory with its bytes."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def command(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start `ddk-cache …` or `ddk-train …` as a process of its own."""
    package = {"ddk-cache": "ddk_cache", "ddk-train": "ddk_train"}[str(words[0])]
    code = f"from {package}.cli import main; main(prog_name={words[0]!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a process; return its exit code, stdout and stderr."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err
