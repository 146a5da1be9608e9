"""Copies of caches: the same bytes, whatever stops them, and several caches as one."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from ddk_cache import CorruptCacheError, InputError, MismatchError, UnknownNameError, open_cache
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.format.manifest import Manifest
from ddk_cache.inspect.verify import verify
from ddk_cache.read.cache import Cache
from ddk_cache.storage.local import LocalStorage
from ddk_cache.storage.remote import RemoteStorage
from ddk_cache.testing import BUILD, random_teacher
from ddk_cache.transfer.combine import combine
from ddk_cache.transfer.copy import copy_cache
from tests.helpers import command, finish, grow, lines, quiet, tree
from tests.s3 import Server
from tests.web import Site


def test_a_copy_has_the_same_bytes(cache: Cache, tmp_path: Path) -> None:
    code, _, err = finish(command("ddk-cache", "copy", cache.root, tmp_path / "copy.zarr"))
    assert code == 0, err
    assert "is finished" in err
    assert tree(tmp_path / "copy.zarr") == tree(cache.root)


def test_a_copy_goes_from_a_web_server_to_a_store_and_back(
    server: Server, cache: Cache, tmp_path: Path
) -> None:
    site = Site(cache.root.parent, failing=True)
    copy_cache(f"{site.url}/{cache.root.name}", "s3://bucket/mix.zarr")
    copy_cache("s3://bucket/mix.zarr", tmp_path / "copy.zarr")
    site.close()
    assert tree(tmp_path / "copy.zarr") == tree(cache.root)
    bucket = RemoteStorage("s3://bucket/mix.zarr")
    assert set(bucket.list_prefix("")) == set(tree(cache.root))


def test_a_copy_that_was_killed_resumes(cache: Cache, tmp_path: Path) -> None:
    to = tmp_path / "copy.zarr"
    shards = len(cache.manifest.shards())
    for part in (1, shards // 2):
        process = command("ddk-cache", "copy", cache.root, to)
        deadline = time.monotonic() + 60
        while len(list(to.glob("commits/*/*/*.json"))) < part and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        finish(process)
        kept = {path: path.stat().st_mtime_ns for path in to.glob("commits/*/*/*.json")}
        assert not open_cache(to, unfinished=True).domains or not verify_committed(to)
    copy_cache(cache.root, to)
    assert tree(to) == tree(cache.root)
    for path, changed in kept.items():
        assert path.stat().st_mtime_ns == changed


def verify_committed(place: Path) -> list[str]:
    """Return what is bad of the committed shards of an unfinished cache."""
    opened = open_cache(place, unfinished=True)
    found = verify(opened, quiet)
    return [p.text for p in found if p.key and opened.is_committed(p.key)]


def test_chosen_domains_and_splits(cache: Cache, tmp_path: Path) -> None:
    words = ("--domains", "letters,notes", "--splits", "validation")
    code, _, err = finish(command("ddk-cache", "copy", cache.root, tmp_path / "c.zarr", *words))
    assert code == 0, err
    copy = open_cache(tmp_path / "c.zarr")
    assert copy.domains == ["letters", "notes"]
    assert not verify(copy, quiet)
    assert [len(copy[name].train) for name in copy] == [0, 0]
    for name in copy:
        ours, theirs = cache[name].validation, copy[name].validation
        assert (ours[:].tokens == theirs[:].tokens).all()
        assert (ours[:].targets.probs == theirs[:].targets.probs).all()
        assert ours.teacher_loss == theirs.teacher_loss
    with pytest.raises(UnknownNameError, match=r"unknown domain 'leters'. Did you mean 'letters'"):
        copy_cache(cache.root, tmp_path / "d.zarr", domains=["leters"])
    with pytest.raises(UnknownNameError, match="unknown split 'test'"):
        copy_cache(cache.root, tmp_path / "d.zarr", splits=["test"])
    with pytest.raises(MismatchError, match="holds other rows of letters"):
        copy_cache(cache.root, tmp_path / "c.zarr", domains=["letters", "notes"])
    assert not (tmp_path / "d.zarr").exists()


def test_several_caches_become_one(cache: Cache, tmp_path: Path) -> None:
    one, two, both = (tmp_path / name for name in ("one.zarr", "two.zarr", "both.zarr"))
    copy_cache(cache.root, one, domains=["letters"])
    copy_cache(cache.root, two, domains=["digits", "notes"])
    copy_cache([one, two], both)
    expected, found = tree(cache.root), tree(both)
    assert {n: d for n, d in found.items() if n != "zarr.json"} == {
        n: d for n, d in expected.items() if n != "zarr.json"
    }
    assert not verify(open_cache(both), quiet)
    with pytest.raises(InputError, match=r"domain 'letters' is in .*one.zarr and in .*mix.zarr"):
        copy_cache([one, cache.root], tmp_path / "no.zarr")
    with pytest.raises(MismatchError, match="holds other domains than are copied: letters"):
        copy_cache(two, both, domains=["digits", "notes"])


def test_caches_that_differ_are_refused_by_field(cache: Cache) -> None:
    root = cache.manifest.root
    spec = dataclasses.replace(root.spec, seed=7, teacher={"class": "another"})
    changed = dataclasses.replace(root, spec=spec, tokenizer_files={})
    other = Cache(LocalStorage(Path("other.zarr")), Manifest(changed, {}))
    with pytest.raises(MismatchError, match="cannot be one cache, for they differ in") as caught:
        combine([cache, other])
    for line in ("  seed: 0 and 7", "  teacher: {", "  tokenizer_files: {"):
        assert line in str(caught.value)
    assert "vocab_size" not in str(caught.value)


def test_what_is_damaged_is_not_copied(cache: Cache, copied: Path, tmp_path: Path) -> None:
    victim = copied / "domains/letters/train/target_ids/c/1/0/0"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptCacheError, match=f"{victim} has changed"):
        copy_cache(copied, tmp_path / "copy.zarr")
    victim.unlink()
    victim.symlink_to(cache.root / "domains/letters/train/target_ids/c/1/0/0")
    with pytest.raises(CorruptCacheError):
        copy_cache(copied, tmp_path / "copy.zarr")
    copy_cache(cache.root, tmp_path / "copy.zarr")
    assert tree(tmp_path / "copy.zarr") == tree(cache.root)


def test_a_place_that_holds_something_else_is_left_alone(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(InputError, match="exists and is not a cache"):
            copy_cache(cache.root, place)
    with pytest.raises(InputError, match=r"https://host/mix.zarr is read-only"):
        copy_cache(cache.root, "https://host/mix.zarr")
    assert tree(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_copy_follows_a_cache_that_grows(tokenizer: Any, tmp_path: Path) -> None:
    corpus, place, copy = tmp_path / "corpus", tmp_path / "mix.zarr", tmp_path / "copy.zarr"
    corpus.mkdir()
    (corpus / "one.jsonl").write_text(lines(0, 40, "abc"))
    for growing in (False, True):
        how = BuildConfig(**BUILD)
        build_cache(place, corpus, random_teacher(), tokenizer, how, grow=growing)
        copy_cache(place, copy)
        assert tree(copy) == tree(place)
        grow(corpus)
