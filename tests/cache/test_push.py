"""Caches onto the Hub and back: the same tree, whatever stops it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddk_cache import CacheError, InputError, UnfinishedCacheError
from ddk_cache.read.cache import Cache
from ddk_cache.storage import hub as hub_storage
from ddk_cache.transfer import push as pushing
from ddk_cache.transfer.push import push_cache
from tests.helpers import command, finish, tree
from tests.hub import Hub

pytest.importorskip("obstore")

URL = "hf://datasets/org/data/mix.zarr"


def pushed(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    """Return the files of the cache on the stand-in."""
    files = hub.files("org/data", branch)
    return {n.removeprefix("mix.zarr/"): d for n, d in files.items() if n.startswith("mix.zarr/")}


def test_pushed_and_pulled_is_the_same_tree(hub: Hub, cache: Cache, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    code, _, err = finish(command("ddk-cache", "push", cache.root, URL, env=environment))
    assert code == 0, err
    assert pushed(hub) == tree(cache.root)
    code, _, err = finish(command("ddk-cache", "pull", URL, tmp_path / "p.zarr", env=environment))
    assert code == 0, err
    assert tree(tmp_path / "p.zarr") == tree(cache.root)
    text = hub.files("org/data")["README.md"].decode()
    for part in (
        "| letters | 40 |",
        "topk:8 of 300 ids",
        "TODO: the license",
        cache.spec.fingerprint,
    ):
        assert part in text


def test_a_second_push_sends_nothing_and_keeps_the_card(hub: Hub, cache: Cache) -> None:
    push_cache(cache.root, f"{URL[:-9]}@draft/mix.zarr")
    assert pushed(hub, "draft") == tree(cache.root)
    assert not pushed(hub)
    before = hub.commits, hub.puts
    hub.files("org/data", "draft")["README.md"] = b"mine"
    push_cache(cache.root, f"{URL[:-9]}@draft/mix.zarr")
    assert (hub.commits, hub.puts) == before
    assert hub.files("org/data", "draft")["README.md"] == b"mine"


def test_readers_see_a_cache_when_all_of_it_is_there(
    hub: Hub, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "PIECE_FILES", 60)
    states: list[bool] = []
    hub.on_commit = lambda number: states.append("zarr.json" in pushed(hub))
    push_cache(cache.root, URL)
    assert len(states) > 4
    assert states == sorted(states)
    assert states[-2:] == [True, True]  # the documents, and the card
    assert states[-3] is False


def test_pushing_to_a_failing_hub(
    make_hub: Callable[..., Hub], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_storage, "PAUSES", (0.1, 0.1))
    hub = make_hub(failing=True)
    push_cache(cache.root, URL)
    assert hub.count > 30
    assert pushed(hub) == tree(cache.root)


def killed_pushes(hub: Hub, cache: Cache, kills: int) -> None:
    """Kill pushes at later and later times; the last one must end with the same tree."""
    call = f"p.PIECE_FILES = 24; p.push_cache({str(cache.root)!r}, {URL!r})"
    code = f"import ddk_cache.transfer.push as p; {call}"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    for number in range(kills):
        seen, goal = hub.count, 3 + 4 * number
        with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
            while hub.count < seen + goal and process.poll() is None:
                time.sleep(0.002)
            process.kill()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert pushed(hub) == tree(cache.root)


def test_a_push_that_was_killed_resumes(hub: Hub, cache: Cache) -> None:
    killed_pushes(hub, cache, 2)


@pytest.mark.slow
def test_ten_kills_end_the_same(hub: Hub, cache: Cache) -> None:
    killed_pushes(hub, cache, 10)


def test_what_arrives_otherwise_is_said(
    hub: Hub, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(number: int) -> None:
        files, victim = hub.files("org/data"), "mix.zarr/tokenizer/tokenizer.json"
        if victim in files:
            files[victim] = b"x" + files[victim][1:]

    hub.on_commit = spoil
    with pytest.raises(CacheError, match=r"1 of \d+ files are not as they were sent, first tokeni"):
        push_cache(cache.root, URL)
    assert "README.md" not in hub.files("org/data")


def test_wrong_calls(
    make_hub: Callable[..., Hub],
    cache: Cache,
    copied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_hub(token="secret")
    with pytest.raises(InputError, match="HF_TOKEN"):
        push_cache(cache.root, URL)
    with pytest.raises(InputError, match="expected hf://datasets/ORG/NAME"):
        push_cache(cache.root, str(tmp_path / "there"))
    (copied / "commits/letters/train/0.json").unlink()
    with pytest.raises(UnfinishedCacheError):
        push_cache(copied, URL)
    code, _, err = finish(command("ddk-cache", "pull", "s3://bucket/mix.zarr", tmp_path / "x"))
    assert code == 2
    assert "expected hf://datasets/ORG/NAME" in err
