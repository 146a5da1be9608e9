"""Several teachers: each domain has the bytes of a cache of its own teacher alone."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_cache import BuildConfig, MismatchError, Teacher, build_cache, find_sources, open_cache
from ddk_cache.build.teachers import Teachers
from ddk_cache.corpus.sources import OWN, Source
from ddk_cache.inspect.describe import describe, show
from ddk_cache.inspect.verify import replay, verify
from ddk_cache.read.cache import Cache
from ddk_cache.testing import BUILD, VOCAB, byte_tokenizer, random_teacher
from ddk_train.provenance import teacher_names
from tests.helpers import quiet, tree

CONFIG = BuildConfig(**BUILD)

LOADED: list[str] = []


def load(name: str) -> tuple[Teacher, Any]:
    """Return one of the random teachers, "1" or "2"; the cache's own is "0"."""
    LOADED.append(name)
    return random_teacher(int(name or 0)), byte_tokenizer()


@pytest.fixture
def sources(corpus: Path, tmp_path: Path) -> list[Source]:
    """The domains digits, letters of teacher 1, and notes."""
    domains = {path.name.partition(".")[0]: {"path": str(path)} for path in corpus.iterdir()}
    domains["letters"]["teacher"] = "1"
    (tmp_path / "mix.yaml").write_text(json.dumps({"domains": domains}))
    return find_sources(tmp_path / "mix.yaml")


def build(path: Path, sources: Sequence[Source], **options: Any) -> None:
    build_cache(path, sources, Teachers(load), byte_tokenizer(), CONFIG, **options)


def domain(path: Path, name: str) -> dict[str, bytes]:
    """Return the arrays and records of a domain."""
    return {at: data for at, data in tree(path).items() if at.split("/")[1:2] == [name]}


def test_a_domain_has_the_bytes_of_its_teacher_alone(
    cache: Cache, corpus: Path, sources: list[Source], tmp_path: Path
) -> None:
    build(tmp_path / "both.zarr", sources)
    build_cache(tmp_path / "1.zarr", corpus, random_teacher(1), byte_tokenizer(), CONFIG)
    for alone, name in (
        (cache.root, "digits"),
        (cache.root, "notes"),
        (tmp_path / "1.zarr", "letters"),
    ):
        assert domain(tmp_path / "both.zarr", name) == domain(alone, name)
        assert len(domain(alone, name)) > 30
    assert not verify(open_cache(tmp_path / "both.zarr"), quiet)
    before, LOADED[:] = tree(tmp_path / "both.zarr"), []
    build(tmp_path / "both.zarr", sources)
    assert tree(tmp_path / "both.zarr") == before
    assert LOADED == ["1", OWN]


def test_one_teacher_is_in_memory_at_a_time() -> None:
    teachers = Teachers(lambda name: (random_teacher(int(name or 0)), None))
    first = weakref.ref(teachers.get()[0])
    assert teachers.get()[0] is first()
    assert teachers.get("1")[0].identity["seed"] == "1"
    gc.collect()
    assert first() is None


def test_verify_info_and_reports_name_the_teacher_of_each_domain(
    sources: list[Source], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "mix.zarr", sources)
    cache = open_cache(tmp_path / "mix.zarr")
    found = replay(cache, random_teacher(1), 8, seed=0)
    assert (found.domains, found.bad) == (["letters"], ())
    assert replay(cache, random_teacher(0), 8, seed=0).domains == ["digits", "notes"]
    with pytest.raises(MismatchError, match=r"another teacher than a callable(.|\n)*letters: of"):
        replay(cache, random_teacher(2), 8, seed=0)
    facts = describe(cache)
    assert {name: d["teacher"] for name, d in facts["domains"].items()} == {
        "digits": "a callable", "letters": "1", "notes": "a callable",
    }  # fmt: skip
    assert facts["domain_teachers"] == {"letters": {"class": "random", "seed": "1"}}
    show(facts)
    assert "teacher of letters: 1 (callable)" in capsys.readouterr().out
    assert teacher_names(cache) == "a callable, 1 (letters)"


def test_another_teacher_of_a_planned_domain_is_refused_and_a_new_one_grows(
    sources: list[Source], tmp_path: Path
) -> None:
    old, path = [s for s in sources if s.name != "letters"], tmp_path / "mix.zarr"
    build(path, old)
    before = tree(path)
    build(path, sources, grow=True)
    assert open_cache(path).manifest.teachers == {"letters": {"class": "random", "seed": "1"}}
    kept = {at: data for at, data in tree(path).items() if at in before and at != "zarr.json"}
    assert kept == {at: data for at, data in before.items() if at != "zarr.json"}
    grown = tree(path)
    (letters,) = (s for s in sources if s.name == "letters")
    other = Source(**vars(letters) | {"teacher": "2"})
    for grow in (True, False):
        with pytest.raises(MismatchError, match=r"letters: the cache has .*'seed': '1'"):
            build(path, [*old, other], grow=grow)
    assert tree(path) == grown


@pytest.mark.parametrize("kind", ["vocabulary", "outputs"])
def test_a_teacher_of_another_vocabulary_is_refused(
    kind: str, sources: list[Source], tmp_path: Path
) -> None:
    def other(name: str) -> tuple[Teacher, Any]:
        words, teacher = byte_tokenizer(), random_teacher()
        if name and kind == "vocabulary":
            words.add_tokens(["<more>"])
        if name and kind == "outputs":
            wide = torch.zeros(1, 1, VOCAB + 8)
            teacher = Teacher(lambda t: wide.expand(*t.shape, -1), VOCAB + 8, {"class": "wide"})
        return teacher, words

    with pytest.raises(MismatchError, match=f"teacher '1': got .*{kind}"):
        build_cache(tmp_path / "x.zarr", sources, Teachers(other), byte_tokenizer(), CONFIG)
    assert not (tmp_path / "x.zarr").exists()
