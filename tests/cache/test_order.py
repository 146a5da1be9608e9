"""Orders: what a process needs to build, wherever it runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_cache import open_cache
from ddk_cache.build.config import BuildConfig
from ddk_cache.cli import main
from ddk_cache.cluster.order import Order
from ddk_cache.models.config import TeacherConfig
from ddk_cache.testing import BUILD, student_config
from tests.helpers import call


def order(**changes: object) -> Order:
    values = {
        "corpus": Path("corpus"),
        "cache": "mix.zarr",
        "teacher": "owner/name",
        "tokenizer": None,
        "config": BuildConfig(),
        "how": TeacherConfig(device="cpu"),
        "grow": False,
    }
    return Order(**values | changes)  # type: ignore[arg-type]


def test_paths_become_absolute_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "head.safetensors").touch()
    made = order(head="head.safetensors").absolute()
    assert made.corpus == tmp_path / "corpus"
    assert made.cache == str(tmp_path / "mix.zarr")
    assert made.teacher == "owner/name"
    assert made.tokenizer is None
    assert made.head == str(tmp_path / "head.safetensors")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert order().absolute().teacher == str(tmp_path / "owner" / "name")
    assert order(cache="s3://bucket/mix.zarr").absolute().cache == "s3://bucket/mix.zarr"


def test_an_order_travels() -> None:
    made = order().absolute()
    assert pickle.loads(pickle.dumps(made)) == made


def test_an_order_builds_with_the_teachers_of_a_mix(
    corpus: Path, teacher_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**student_config())).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    domains = {
        "digits": {"path": str(corpus / "digits.csv")},
        "notes": {"path": str(corpus / "notes"), "teacher": "other"},
    }
    (tmp_path / "mix.yaml").write_text(json.dumps({"domains": domains}))
    cache = tmp_path / "mix.zarr"
    order(
        corpus=tmp_path / "mix.yaml", cache=str(cache), teacher=str(teacher_dir),
        config=BuildConfig(**BUILD),
    ).absolute().build()  # fmt: skip
    opened = open_cache(cache)
    assert opened.manifest.root.sources["notes"]["teacher_name"] == "other"
    assert list(opened.manifest.teachers) == ["notes"]
    words = ["verify", cache, "--rows", 4, "--teacher"]
    for teacher, domain in ((teacher_dir, "digits"), (tmp_path / "other", "notes")):
        done = call(main, *words, teacher)
        assert done.exit_code == 0, done.output
        assert f"teacher on 4 rows of {domain}, nats" in done.output
