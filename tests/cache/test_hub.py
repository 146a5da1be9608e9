"""Caches on the Hugging Face Hub, for reading; the Hub is the stand-in of `tests.hub`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_cache import InputError, NotACacheError, open_cache
from ddk_cache.inspect.verify import verify
from ddk_cache.read.cache import Cache
from ddk_cache.storage.hub import HubPlace
from ddk_cache.storage.open import open_storage
from ddk_cache.transfer.copy import copy_cache
from ddk_train import train
from tests.helpers import Configure, quiet, timeless, tree
from tests.hub import Hub

pytest.importorskip("obstore")

URL = "hf://datasets/org/data/mix.zarr"


def fill(hub: Hub, cache: Cache) -> None:
    """Put a cache into a data set."""
    hub.add("org/data", "main", {f"mix.zarr/{n}": data for n, data in tree(cache.root).items()})


def test_urls() -> None:
    assert HubPlace.parse(URL) == ("org/data", "main", "mix.zarr")
    assert HubPlace.parse("hf://datasets/org/data@v%2F1/a/b.zarr/") == (
        "org/data",
        "v/1",
        "a/b.zarr",
    )
    for rest in (
        "org/data/mix.zarr",
        "datasets/org/data",
        "datasets/org/../x",
        "datasets/o/d/../x",
    ):
        with pytest.raises(InputError, match="expected hf://datasets/ORG/NAME"):
            HubPlace.parse(f"hf://{rest}")


def test_rows_from_the_hub_are_those_of_the_files(hub: Hub, cache: Cache) -> None:
    fill(hub, cache)
    remote = open_cache(URL)
    for opened in (remote, pickle.loads(pickle.dumps(remote))):
        rows = cache.row_numbers("letters", "train")
        ours, theirs = (c.read_stored("letters", "train", rows) for c in (cache, opened))
        for name, array in ours.items():
            np.testing.assert_array_equal(theirs[name], array)
    assert not verify(remote, quiet)
    place = open_storage(URL)
    assert set(place.list_prefix("")) == set(tree(cache.root))
    assert place.exists("zarr.json")
    assert not place.exists("nothing")
    assert place.list_dir("nothing") == []
    with pytest.raises(InputError, match=r"read-only here. Write a cache to a directory"):
        place.put("a", b"")


def test_training_from_a_failing_hub_gives_the_same_losses(
    make_hub: Callable[..., Hub], cache: Cache, configure: Configure, tmp_path: Path
) -> None:
    hub = make_hub(failing=True)
    fill(hub, cache)
    how: dict[str, Any] = {"shard_cache": str(tmp_path / "shards"), "steps": 4}
    local, remote = train(configure("local", steps=4)), train(configure("hub", cache=URL, **how))
    assert hub.count > 40
    assert timeless(remote.metrics()) == timeless(local.metrics())
    assert timeless(remote.history()) == timeless(local.history())


def test_a_cache_stays_at_its_commit(hub: Hub, cache: Cache, tmp_path: Path) -> None:
    fill(hub, cache)
    remote = open_cache(URL)
    hub.add("org/data", "main", {"README.md": b""})
    assert remote["letters"].train[0].tokens.shape == (17,)
    with pytest.raises(NotACacheError):
        open_cache(URL)
    commit = next(name for name, files in hub.history.items() if len(files) > 1)
    copy_cache(f"hf://datasets/org/data@{commit}/mix.zarr", tmp_path / "copy.zarr")
    assert tree(tmp_path / "copy.zarr") == tree(cache.root)


def test_what_is_not_there_is_said(hub: Hub, cache: Cache) -> None:
    with pytest.raises(InputError, match="there is no such data set, or it is private"):
        open_cache(URL)
    fill(hub, cache)
    with pytest.raises(InputError, match="no such revision"):
        open_cache("hf://datasets/org/data@old/mix.zarr")


def test_a_private_data_set_is_read_with_its_token(
    make_hub: Callable[..., Hub], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(make_hub(token="secret"), cache)
    with pytest.raises(InputError, match="HF_TOKEN"):
        open_cache(URL)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert len(open_cache(URL)["letters"].train[:4].tokens) == 4
