"""Fixtures: a byte tokenizer, a corpus of three domains, a teacher, a cache, a student, a store.

Everything is small and real (`ddk_cache.testing`). Tests on real text need DDK_DATA, a folder with
corpus/ and teacher/, and are skipped with that reason where it is unset.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from ddk_cache import testing
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.build.teacher import Teacher
from ddk_cache.corpus.sources import find_sources
from ddk_cache.read.cache import Cache, open_cache
from ddk_train import TrainConfig
from tests.helpers import RUN, Configure
from tests.hub import Hub
from tests.s3 import Server
from tests.sequences import Material, make_material

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI") == "true":
    settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none, unless it is rehearsed on another device."""
    if not torch.cuda.is_available() and "DDK_TEST_DEVICE" not in os.environ:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return testing.byte_tokenizer()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="session")
def make_cache(corpus: Path, tokenizer: Any) -> Callable[..., Cache]:
    def make(path: str | Path, **settings: Any) -> Cache:
        teacher = settings.pop("teacher", testing.random_teacher())
        words = settings.pop("tokenizer", tokenizer)
        config = BuildConfig(**testing.BUILD | settings)
        build_cache(path, find_sources(corpus), teacher, words, config)
        return open_cache(path)

    return make


@pytest.fixture(scope="session")
def cache(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A finished cache; nobody may change it."""
    return make_cache(tmp_path_factory.mktemp("cache") / "mix.zarr")


@pytest.fixture
def copied(cache: Cache, tmp_path: Path) -> Path:
    """A copy of `cache` that a test may change."""
    return Path(shutil.copytree(cache.root, tmp_path / "mix.zarr"))


@pytest.fixture(scope="session")
def packed_cache(
    make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory
) -> Cache:
    """A finished cache of documents that are kept apart; nobody may change it."""
    path = tmp_path_factory.mktemp("packed") / "mix.zarr"
    return make_cache(path, packing="documents", seq_len=40, targets="sampled:6")


@pytest.fixture(scope="session")
def prophet() -> Teacher:
    """A teacher that sees the next token, so that every student stays behind it."""

    def logits(tokens_BS: torch.Tensor) -> torch.Tensor:
        ahead = tokens_BS.roll(-1, dims=-1)
        return 7.0 * torch.nn.functional.one_hot(ahead, testing.VOCAB).float()

    return Teacher(logits, testing.VOCAB, {"class": "prophet"})


@pytest.fixture(scope="session")
def prophet_cache(
    make_cache: Callable[..., Cache], prophet: Teacher, tmp_path_factory: pytest.TempPathFactory
) -> Cache:
    """A finished cache of the prophet."""
    return make_cache(tmp_path_factory.mktemp("prophet") / "mix.zarr", teacher=prophet)


@pytest.fixture(scope="session")
def student_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "config.json"
    path.write_text(json.dumps(testing.student_config()))
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
    LlamaForCausalLM(LlamaConfig(**testing.student_config(hidden_size=32))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Prompts, responses, and a finished cache with pairs; nobody may change it."""
    return make_material(tmp_path_factory.mktemp("sequences"))


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


@pytest.fixture
def make_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Hub]]:
    """Make a stand-in for the Hugging Face Hub, and the environment that leads there."""
    made: list[Hub] = []

    def make_hub(**how: Any) -> Hub:
        made.append(Hub(**how))
        monkeypatch.setenv("HF_ENDPOINT", made[-1].url)
        return made[-1]

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield make_hub
    for hub in made:
        hub.close()


@pytest.fixture
def hub(make_hub: Callable[..., Hub]) -> Hub:
    return make_hub()


@pytest.fixture(scope="session")
def data() -> Path:
    """The shared corpus and teacher."""
    place = os.environ.get("DDK_DATA")
    if not place:
        pytest.skip("DDK_DATA is unset: it names a folder with corpus/ and teacher/")
    return Path(place)
