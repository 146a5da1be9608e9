"""A cache grows, and its old bytes and the runs that know them stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_cache import InputError, MismatchError, open_cache
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.inspect.verify import verify
from ddk_cache.read.cache import Cache
from ddk_cache.testing import BUILD, random_teacher
from ddk_train import TrainConfig, train
from tests.helpers import grow, lines, quiet, timeless, tree


@pytest.fixture
def growing(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "one.jsonl").write_text(lines(0, 40, "abc"))
    return folder


def make(folder: Path, tokenizer: Any, path: Path, *, grow: bool = False) -> Cache:
    build_cache(path, folder, random_teacher(), tokenizer, BuildConfig(**BUILD), grow=grow)
    return open_cache(path)


def test_a_cache_grows_and_its_old_bytes_stay(
    growing: Path, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "mix.zarr"
    before = make(growing, tokenizer, path)
    old = before.read("one", "train", before.row_numbers("one", "train"))
    objects = {n: b for n, b in tree(path).items() if "/c/" in n or n.startswith("commits")}
    grow(growing)
    with pytest.raises(MismatchError, match=r"one: .*(\n.*)*--grow"):
        make(growing, tokenizer, path)
    after = make(growing, tokenizer, path, grow=True)
    now = tree(path)
    assert {name: now[name] for name in objects} == objects
    assert after.domains == ["one", "two"]
    assert [p.documents for p in after.plan("one").portions] == [40, 70]
    again = after.read("one", "train", before.row_numbers("one", "train"))
    np.testing.assert_array_equal(again.tokens, old.tokens)
    assert after.plan("one").rows("train") > before.plan("one").rows("train")
    assert not verify(after, quiet)
    assert tree(make(growing, tokenizer, path).root) == now
    assert tree(make(growing, tokenizer, path, grow=True).root) == now


def test_a_domain_grows_at_its_end_only(growing: Path, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "mix.zarr"
    make(growing, tokenizer, path)
    before = tree(path / "domains")
    text = (growing / "one.jsonl").read_text()
    (growing / "one.jsonl").write_text('{"text": "a new beginning"}\n' + text)
    with pytest.raises(MismatchError, match="grows at its end only"):
        make(growing, tokenizer, path, grow=True)
    assert tree(path / "domains") == before


def test_a_growth_that_fails_leaves_a_finished_cache_as_it_was(
    growing: Path, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "mix.zarr"
    before = make(growing, tokenizer, path)
    documents = tree(path / "plans") | tree(path / "commits")
    root = (path / "zarr.json").read_bytes()
    grow(growing)
    (growing / "zero.jsonl").write_text("")
    with pytest.raises(InputError, match="zero"):
        make(growing, tokenizer, path, grow=True)
    assert (path / "zarr.json").read_bytes() == root
    assert {n: (tree(path / "plans") | tree(path / "commits"))[n] for n in documents} == documents
    opened = open_cache(path)
    assert opened.domains == before.domains
    assert not verify(opened, quiet)
    (growing / "zero.jsonl").unlink()
    assert (path / "plans/two.json").exists()
    # What the failed growth had planned of `two` is of other documents now.
    (growing / "two.jsonl").write_text(lines(0, 30, "uvw"))
    after = make(growing, tokenizer, path, grow=True)
    assert after.domains == ["one", "two"]
    assert [p.documents for p in after.plan("one").portions] == [40, 70]
    assert not verify(after, quiet)
    fresh = tmp_path / "fresh.zarr"
    (growing / "one.jsonl").unlink()
    make(growing, tokenizer, fresh)
    assert tree(path / "domains/two") == tree(fresh / "domains/two")


def test_a_first_build_with_a_bad_domain_goes_on_without_it_or_with_it_mended(
    growing: Path, tokenizer: Any, tmp_path: Path
) -> None:
    for mend in (True, False):
        path = tmp_path / f"{mend}.zarr"
        (growing / "two.jsonl").write_text("")
        with pytest.raises(InputError, match="two"):
            make(growing, tokenizer, path)
        (growing / "two.jsonl").unlink()
        if mend:
            (growing / "two.jsonl").write_text(lines(0, 30, "xyz"))
        made = make(growing, tokenizer, path)
        assert made.domains == (["one", "two"] if mend else ["one"])
        assert not verify(made, quiet)
        (growing / "one.jsonl").rename(growing / "three.jsonl")
        with pytest.raises(MismatchError, match="one: "):
            make(growing, tokenizer, path)
        (growing / "three.jsonl").rename(growing / "one.jsonl")


def test_a_resumed_run_keeps_to_its_rows_unless_told_otherwise(
    growing: Path, tokenizer: Any, student_config: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mix.zarr"
    make(growing, tokenizer, path)

    def config(run: str, steps: int, **changes: Any) -> TrainConfig:
        paths: dict[str, Any] = {
            "cache": str(path),
            "run": str(tmp_path / run),
            "student": str(student_config),
        }
        settings: dict[str, Any] = {"rows": 4, "interval": 2, "eval_rows": 4, "log_every": 1}
        settings |= {"steps": steps, "warmup": 0, "min_lr": 1.0}
        return TrainConfig(**paths, **settings, **changes)

    whole = train(config("whole", 8))
    for run in ("kept", "told"):
        train(config(run, 4))
    grow(growing)
    make(growing, tokenizer, path, grow=True)
    kept = train(config("kept", 8))
    assert timeless(kept.history()) == timeless(whole.history())
    assert tree(kept.student).keys() == tree(whole.student).keys()
    told = train(config("told", 8, new_rows=True))
    assert {row["domain"] for row in told.history() if row["step"] == 8} == {"one", "two"}
    assert {row["domain"] for row in told.history() if row["step"] == 2} == {"one"}
    seen = {row["domain"]: row["rows_seen"] for row in told.history() if row["step"] == 8}
    assert sum(seen.values()) == 32
    assert seen["two"] > 0
