"""A cache on a static web server: the same rows, and what is said where that fails."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_cache import InputError, NotACacheError, StorageError, UnfinishedCacheError, open_cache
from ddk_cache.cli import main
from ddk_cache.errors import CorruptCacheError
from ddk_cache.format import manifest
from ddk_cache.inspect.verify import verify
from ddk_cache.read.cache import Cache
from ddk_cache.storage.http import HttpStorage
from ddk_cache.storage.open import open_storage
from ddk_train import train
from tests.helpers import Configure, call, command, failure, finish, quiet, timeless
from tests.web import Site

pytest.importorskip("obstore")

Serve = Callable[..., Site]


@pytest.fixture
def serve() -> Iterator[Serve]:
    sites: list[Site] = []

    def serve(folder: Path, **how: bool) -> Site:
        sites.append(Site(folder, **how))
        return sites[-1]

    yield serve
    for site in sites:
        site.close()


def same_rows(one: Cache, other: Cache) -> None:
    for domain in one.domains:
        rows = one.row_numbers(domain, "train")
        ours, theirs = (c.read_stored(domain, "train", rows) for c in (one, other))
        for name, array in ours.items():
            np.testing.assert_array_equal(theirs[name], array)


def test_rows_from_a_web_server_are_those_of_the_files(serve: Serve, cache: Cache) -> None:
    site = serve(cache.root.parent)
    remote = open_cache(f"{site.url}/{cache.root.name}")
    assert remote.uri == f"{site.url}/{cache.root.name}"
    same_rows(cache, remote)
    same_rows(cache, pickle.loads(pickle.dumps(remote)))
    assert not verify(remote, quiet)
    assert set(site.methods) == {"GET", "HEAD"}


def test_the_commands_take_a_url(serve: Serve, cache: Cache) -> None:
    url = f"{serve(cache.root.parent).url}/{cache.root.name}"
    code, out, err = finish(command("ddk-cache", "info", url, "--json"))
    assert code == 0, err
    assert json.loads(out)["path"] == url


def test_training_from_a_failing_server_gives_the_same_losses(
    serve: Serve, cache: Cache, configure: Configure
) -> None:
    site = serve(cache.root.parent, failing=True)
    local = train(configure("local", steps=4))
    remote = train(configure("remote", cache=f"{site.url}/{cache.root.name}", steps=4))
    assert site.count > 40
    assert timeless(remote.metrics()) == timeless(local.metrics())
    assert timeless(remote.history()) == timeless(local.history())


def test_a_server_without_ranges_is_refused_unless_shards_are_kept(
    serve: Serve, cache: Cache, tmp_path: Path
) -> None:
    url = f"{serve(cache.root.parent, ranges=False).url}/{cache.root.name}"
    with pytest.raises(StorageError, match="got the whole object from the server") as caught:
        open_cache(url)["letters"].train[0]
    assert url in str(caught.value)
    same_rows(cache, open_cache(url, shard_cache=tmp_path / "shards"))


@pytest.mark.slow
def test_a_server_that_is_gone_is_said_in_one_message_and_the_checkpoint_stays(
    serve: Serve, cache: Cache, student_config: Path, tmp_path: Path
) -> None:
    site, run = serve(cache.root.parent), tmp_path / "run"
    words = ["--steps", 100_000, "--interval", 20, "--rows", 4, "--eval-rows", 2]
    process = command(
        *("ddk-train", "run", f"{site.url}/{cache.root.name}", run, "--student", student_config),
        *words,
        env=os.environ | {"DDK_PATIENCE": "1"},
    )
    deadline = time.monotonic() + 100
    while not list(run.glob("checkpoints/step-*[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.05)
    site.close()
    assert "cannot be reached" in failure(process)
    for checkpoint in run.glob("checkpoints/step-*[0-9]"):
        assert (checkpoint / "state.json").exists()
        assert (checkpoint / "torch.pt").exists()


def test_what_is_not_there_is_said(serve: Serve, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(NotACacheError, match="is not a cache"):
        open_cache(f"{serve(tmp_path).url}/nothing.zarr")
    (copied / "commits/letters/train/1.json").unlink()
    url = f"{serve(tmp_path).url}/mix.zarr"
    with pytest.raises(UnfinishedCacheError, match="rows are committed"):
        open_cache(url)
    (copied / "plans/letters.json").unlink()
    with pytest.raises(UnfinishedCacheError, match="the rows of letters are not planned"):
        open_cache(url)


def test_a_plan_of_more_shards_than_can_be_asked_for_is_refused(
    serve: Serve, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MOST_UNLISTED", 1000)
    monkeypatch.setattr(manifest, "shard_count", lambda *plan: 2000)
    with pytest.raises(CorruptCacheError, match="2,000 shards"):
        open_cache(f"{serve(cache.root.parent).url}/{cache.root.name}")


CHANGES: list[Callable[[HttpStorage], Any]] = [
    lambda place: place.put("a", b""),
    lambda place: place.put_if_absent("a", b""),
    lambda place: place.put_file(Path("a"), "a"),
    lambda place: place.delete("a"),
    lambda place: place.delete_dir("a"),
    lambda place: place.list_dir("a"),
    lambda place: place.list_prefix("a"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_web_server_is_read_only(change: Callable[[HttpStorage], Any]) -> None:
    place = open_storage("https://host/mix.zarr")
    assert isinstance(place, HttpStorage)
    with pytest.raises(InputError, match=r"https://host/mix.zarr is read-only"):
        change(place)


def test_a_build_at_a_web_server_is_refused(corpus: Path) -> None:
    done = call(main, "build", corpus, "https://host/mix.zarr", "--teacher", "any")
    assert done.exit_code == 2
    assert "Error: https://host/mix.zarr is read-only here" in done.stderr
