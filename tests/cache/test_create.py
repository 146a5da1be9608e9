"""A place is taken, or free, or holds a cache whose settings may still change."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_cache import BuildConfig, CacheError, InputError, MismatchError, Teacher, build_cache
from ddk_cache.format.place import check_place
from ddk_cache.read.cache import Cache, open_cache
from ddk_cache.storage.lease import Leases
from ddk_cache.storage.local import LocalStorage
from ddk_cache.testing import BUILD, VOCAB, random_teacher
from tests.helpers import tree

Make = Callable[..., Cache]


def test_a_taken_place_is_refused_and_left_alone(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "movie.partial").write_text("half of it")
    for place in (tmp_path, tmp_path / "movie.partial"):
        with pytest.raises(InputError, match="exists and is not a cache"):
            check_place(LocalStorage(place))
    assert (tmp_path / "movie.partial").read_text() == "half of it"
    check_place(LocalStorage(tmp_path / "new"))
    check_place(LocalStorage(cache.root))


def test_only_temporary_files_of_a_build_are_removed(make_cache: Make, tmp_path: Path) -> None:
    path = tmp_path / "mix.zarr"
    path.mkdir()
    (path / "zarr.json~gone+99999999+1.partial").write_text("ours")
    make_cache(path)
    (path / "movie.partial").write_text("half of it")
    (path / "x~movie.partial").write_text("half of it")
    make_cache(path)
    assert sorted(file.name for file in path.glob("*.partial")) == [
        "movie.partial",
        "x~movie.partial",
        "zarr.json~gone+99999999+1.partial",  # of another host, and young
    ]


def test_a_build_that_planned_nothing_pins_no_settings(
    make_cache: Make, cache: Cache, tokenizer: Any, tmp_path: Path
) -> None:
    path, bad = tmp_path / "mix.zarr", tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jsonl").write_text("")
    other = BuildConfig(**BUILD | {"seq_len": 8, "targets": "sampled:4", "batch_rows": 2})
    with pytest.raises(InputError, match="'a'"):
        build_cache(path, bad, random_teacher(seed=1), tokenizer, other)
    assert (path / "zarr.json").exists()
    make_cache(path)
    assert tree(path) == tree(cache.root)


def test_settings_hold_while_another_process_works(
    corpus: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = tmp_path / "mix.zarr", BuildConfig(**BUILD)
    with monkeypatch.context() as patch:
        patch.setattr("ddk_cache.build.tokenize.plan_domain", interrupted)
        with pytest.raises(CacheError, match="interrupted"):
            build_cache(path, corpus, random_teacher(), tokenizer, config)
    at_work = Leases(LocalStorage(path))
    assert at_work.take("digits.plan")
    other = BuildConfig(**BUILD | {"seq_len": 8})
    with pytest.raises(MismatchError, match="seq_len"):
        build_cache(path, corpus, random_teacher(), tokenizer, other)
    at_work.release_all()
    build_cache(path, corpus, random_teacher(), tokenizer, other)
    assert open_cache(path).spec.seq_len == 8


def interrupted(*_: object) -> None:
    raise CacheError("interrupted")


def test_an_unusable_teacher_is_found_before_the_corpus_is_read(
    make_cache: Make, tmp_path: Path
) -> None:
    good = random_teacher()

    def build(logits: Callable[[torch.Tensor], Any], said: str, **settings: Any) -> None:
        teacher = Teacher(logits, VOCAB, settings.pop("identity", good.identity))
        with pytest.raises((CacheError, InputError), match=said):
            make_cache(tmp_path / "mix.zarr", teacher=teacher, **settings)
        assert not (tmp_path / "mix.zarr").exists()

    build(lambda tokens: good.logits(tokens) * math.nan, "a first batch .*Check the teacher's")
    half = {"class": "random", "dtype": "float16"}
    build(lambda tokens: good.logits(tokens) * math.nan, "--dtype float32", identity=half)
    build(lambda tokens: good.logits(tokens)[..., 1:], r"got a torch.float32 tensor of shape")
    build(lambda tokens: good.logits(tokens).numpy(), "got ndarray, expected a torch tensor")
    build(lambda tokens: good.logits(tokens)[:, 1:], r"expected .* \(1, 16, 300\)")
    build(lambda tokens: None, "got NoneType", batch_rows=None)
    build(lambda tokens: tokens, "got a torch.int64 tensor")


def test_rows_that_are_longer_than_the_teacher_was_made_for_are_refused(
    corpus: Path, tokenizer: Any, tmp_path: Path
) -> None:
    good = random_teacher()
    teacher = Teacher(good.logits, VOCAB, good.identity, positions=15)
    with pytest.raises(InputError, match="seq_len: got 16, expected at most 15, the positions"):
        build_cache(tmp_path / "x", corpus, teacher, tokenizer, BuildConfig(**BUILD))
    narrow = Teacher(good.logits, 256, good.identity)
    with pytest.raises(InputError, match="the tokenizer has 257 tokens and the teacher only 256"):
        build_cache(tmp_path / "x", corpus, narrow, tokenizer, BuildConfig(**BUILD))
    assert not (tmp_path / "x").exists()
