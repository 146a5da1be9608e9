"""Orders: what a process needs to build, wherever it runs."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from ddk_cache.build.config import BuildConfig
from ddk_cache.order import Order


def order(**changes: object) -> Order:
    values = {
        "corpus": Path("corpus"),
        "cache": "mix.zarr",
        "teacher": "owner/name",
        "tokenizer": None,
        "config": BuildConfig(),
        "how": {"device": "cpu", "head": None},
        "grow": False,
    }
    return Order(**values | changes)  # type: ignore[arg-type]


def test_paths_become_absolute_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "head.safetensors").touch()
    made = order(how={"device": "cpu", "head": "head.safetensors"}).absolute()
    assert made.corpus == tmp_path / "corpus"
    assert made.cache == str(tmp_path / "mix.zarr")
    assert made.teacher == "owner/name"
    assert made.tokenizer is None
    assert made.how == {"device": "cpu", "head": str(tmp_path / "head.safetensors")}
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert order().absolute().teacher == str(tmp_path / "owner" / "name")
    assert order(cache="s3://bucket/mix.zarr").absolute().cache == "s3://bucket/mix.zarr"


def test_an_order_travels() -> None:
    made = order().absolute()
    assert pickle.loads(pickle.dumps(made)) == made
