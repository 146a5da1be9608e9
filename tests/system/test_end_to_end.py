"""The whole line on real text with a real teacher, where DDK_DATA names them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ddk_cache import load_teacher
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.hf import load_tokenizer
from ddk_cache.inspect.verify import verify
from ddk_cache.read.cache import open_cache
from ddk_cache.testing import student_config
from ddk_train import TrainConfig, train

DOMAINS = ("latex", "math_word", "wiki")


@pytest.fixture(scope="module")
def cache_path(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    domains = {
        name: {"path": str(data / "corpus" / f"{name}.parquet"), "tokens": 25_000}
        for name in DOMAINS
    }
    (folder / "mix.yaml").write_text(json.dumps({"domains": domains}))
    teacher = str(data / "teacher")
    build_cache(
        folder / "mix.zarr",
        folder / "mix.yaml",
        load_teacher(teacher),
        load_tokenizer(teacher),
        BuildConfig(seq_len=128, targets="topk:32", holdout=0.3, shard_rows=128),
    )
    return folder / "mix.zarr"


def test_the_teacher_is_as_good_as_it_is_known_to_be(cache_path: Path) -> None:
    cache = open_cache(cache_path)
    assert not verify(cache, lambda _: None)
    losses = {}
    for name in DOMAINS:
        pairs = [cache.teacher_loss(name, split) for split in ("train", "validation")]
        losses[name] = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
    assert losses["latex"] < losses["math_word"] < losses["wiki"] < 5
    rows = cache.read("latex", "train", np.arange(8))
    assert 0.8 < rows.targets.probs.sum(-1).mean() < 1


def test_a_student_learns_from_it(cache_path: Path, tmp_path: Path) -> None:
    config = student_config(vocab_size=16384, hidden_size=32, max_position_embeddings=128)
    (tmp_path / "student.json").write_text(json.dumps(config))
    run = train(
        TrainConfig(
            cache=str(cache_path),
            run=str(tmp_path / "run"),
            student=str(tmp_path / "student.json"),
            steps=8,
            interval=4,
            rows=8,
            eval_rows=8,
            lr=1e-2,
            log_every=1,
        )
    )
    first, last = run.metrics()[0], run.metrics()[-1]
    assert last["ce"] < first["ce"] - 0.3
    assert {row["domain"] for row in run.history()} == set(DOMAINS)
