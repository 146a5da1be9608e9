"""A cache in an object store: a real S3 server on loopback, also one that fails and one that goes.

The server is that of `tests.s3`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_cache import CorruptCacheError, NotACacheError, open_cache
from ddk_cache.errors import InputError, StorageError
from ddk_cache.inspect.describe import describe
from ddk_cache.read.cache import Cache
from ddk_cache.storage.base import ByteRange, Storage
from ddk_cache.storage.local import LocalStorage
from ddk_cache.storage.remote import RemoteStorage
from ddk_train import TrainConfig, train
from tests.helpers import command, failure, finish, timeless, tree
from tests.s3 import Flaky, Server


def upload(cache: Cache, url: str) -> str:
    """Copy a cache as it is, which is all that it takes."""
    bucket = RemoteStorage(url)
    for name, data in tree(cache.root).items():
        bucket.put(name, data)
    return url


# --- the same answers from every place ------------------------------------------------------------


def same_answers(place: Storage) -> None:
    """Ask everything that a place can be asked."""
    assert place.get("a/none") is None
    assert place.list_dir("a") == []
    place.put("a/one", b"0123456789")
    place.put("a/one", b"9876543210")
    assert place.get("a/one") == b"9876543210"
    assert place.put_if_absent("a/two", b"first")
    assert not place.put_if_absent("a/two", b"second")
    assert place.get("a/two") == b"first"
    place.put("a/b/three", b"x" * 100)
    assert sorted(place.list_dir("a")) == ["b", "one", "two"]
    assert sorted(place.list_prefix("a")) == ["a/b/three", "a/one", "a/two"]
    assert place.exists("a/one")
    assert not place.exists("a/none")
    found = place.get_with_age("a/two")
    assert found
    assert found[0] == b"first"
    assert -2 < found[1] < 60
    assert place.get_with_age("a/none") is None
    wanted = [ByteRange("a/one", 2, 3), ByteRange("a/one", 8, 2), ByteRange("a/two", 0, 5)]
    assert list(place.get_ranges(wanted)) == [b"765", b"10", b"first"]
    place.delete("a/two")
    place.delete("a/two")
    assert place.get("a/two") is None
    assert place.uri("a/one").endswith("/a/one")
    place.scratch.mkdir(parents=True, exist_ok=True)
    made = place.scratch / "made"
    made.write_bytes(b"handed over")
    place.put_file(made, "a/b/four")
    assert not made.exists()
    assert place.get("a/b/four") == b"handed over"
    place.delete_dir("a/b")
    place.delete_dir("a/none")
    assert list(place.list_prefix("a")) == ["a/one"]
    place.clean_up()
    assert not place.scratch.exists()
    assert list(place.list_prefix("")) == ["a/one"]


def test_a_folder_and_every_kind_of_store_give_the_same_answers(
    tmp_path: Path, server: Server
) -> None:
    (tmp_path / "files").mkdir()
    same_answers(LocalStorage(tmp_path / "folder"))
    same_answers(RemoteStorage(f"file://{tmp_path}/files"))
    same_answers(RemoteStorage("memory:///"))
    same_answers(RemoteStorage("s3://bucket/place"))


def test_a_url_that_is_no_store_is_refused(server: Server) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        open_cache("gopher://old/mix.zarr")
    with pytest.raises(NotACacheError, match="s3://bucket/nothing is not a cache"):
        open_cache("s3://bucket/nothing")


def test_what_is_there_as_it_was_asked_for_counts_as_created(server: Server) -> None:
    """An answer that was lost must not make a process wait for itself."""
    bucket = RemoteStorage("s3://bucket/place")
    assert bucket.put_if_absent("claim", b"mine")
    assert bucket.put_if_absent("claim", b"mine")
    assert not bucket.put_if_absent("claim", b"another's")


def test_a_bucket_that_is_not_there_is_said(server: Server) -> None:
    with pytest.raises(InputError, match="there is no such bucket"):
        RemoteStorage("s3://elsewhere/place").put_if_absent("name", b"")


def test_info_and_verify_take_a_url(server: Server, cache: Cache) -> None:
    url = upload(cache, "s3://bucket/mix.zarr")
    code, out, err = finish(command("ddk-cache", "info", url, "--json"))
    assert code == 0, err
    assert json.loads(out)["path"] == url
    assert finish(command("ddk-cache", "verify", url))[0] == 0
    victim = "domains/letters/train/target_ids/c/0/0/0"
    whole = RemoteStorage(url).get(victim)
    assert whole is not None
    RemoteStorage(url).put(victim, whole[:-9] + b"?" + whole[-8:])
    code, out, _ = finish(command("ddk-cache", "verify", url))
    assert code == 1
    assert f"{url}/{victim} has changed" in out


def test_records_are_asked_for_together(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record once, and requests that overlap."""
    url = upload(cache, "s3://bucket/mix.zarr")
    opened, get = open_cache(url), RemoteStorage.get
    under_way, most, asked, lock = 0, 0, [], threading.Lock()

    def counted(storage: RemoteStorage, name: str) -> bytes | None:
        nonlocal under_way, most
        with lock:
            asked.append(name)
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        data = get(storage, name)
        with lock:
            under_way -= 1
        return data

    monkeypatch.setattr(RemoteStorage, "get", counted)
    assert describe(opened)["tokens"] == 16 * sum(
        len(s) for d in cache.values() for s in d.values()
    )
    assert len(asked) == len(set(asked)) == len(cache.manifest.shards())
    assert most > 4


def test_a_forked_process_is_told_to_be_spawned(server: Server, cache: Cache) -> None:
    url = upload(cache, "s3://bucket/mix.zarr")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply(message_of_reading, [url])
    assert "cannot be read in a forked process" in found
    assert "spawn" in found
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(message_of_reading, [open_cache(url)]) == ""


def message_of_reading(place: Any) -> str:
    """Read a row in this process; return what is said against it."""
    try:
        (open_cache(place) if isinstance(place, str) else place)["letters"].train[0]
    except InputError as error:
        return str(error)
    return ""


# --- reading --------------------------------------------------------------------------------------


def test_rows_from_s3_are_those_of_the_files(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(cache, "s3://bucket/mix.zarr")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.flaky}")
    remote = open_cache(url)
    for domain in cache.domains:
        rows = cache.row_numbers(domain, "train")
        ours, theirs = (c.read_stored(domain, "train", rows) for c in (cache, remote))
        for name, array in ours.items():
            np.testing.assert_array_equal(theirs[name], array)
    assert Flaky.count > 20


def test_whole_shards_are_kept_up_to_a_size_and_still_checked(
    server: Server, cache: Cache, tmp_path: Path
) -> None:
    url, folder = upload(cache, "s3://bucket/mix.zarr"), tmp_path / "shards"
    rows = cache.row_numbers("letters", "train")
    expected = cache.read_stored("letters", "train", rows)

    def read(size: str) -> None:
        opened = open_cache(url, shard_cache=folder, shard_cache_size=size)
        for name, array in opened.read_stored("letters", "train", rows).items():
            np.testing.assert_array_equal(array, expected[name])

    read("1G")
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(kept) == cache.shard_count("letters", "train") * len(cache.spec.arrays)
    bucket = RemoteStorage(url)
    for number in range(cache.shard_count("letters", "train")):
        bucket.delete(f"domains/letters/train/target_ids/c/{number}/0/0")
    read("1G")  # from the copies alone
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-5] + b"?????")
    with pytest.raises(CorruptCacheError):
        read("1G")
    upload(cache, url)
    for path in folder.iterdir():
        path.unlink()
    read("2K")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2000
    with pytest.raises(InputError, match="is not a size"):
        read("much")


@pytest.fixture
def configure(student_config: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def configure(cache: str, run: str, **changes: Any) -> TrainConfig:
        paths: dict[str, Any] = {"run": str(tmp_path / run), "student": str(student_config)}
        settings: dict[str, Any] = {"steps": 6, "interval": 3, "rows": 4, "eval_rows": 4}
        return TrainConfig(cache=cache, **paths, **settings | {"log_every": 1} | changes)

    return configure


def test_training_from_a_failing_s3_gives_the_same_losses(
    server: Server,
    cache: Cache,
    configure: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = train(configure(str(cache.root), "local"))
    url = upload(cache, "s3://bucket/mix.zarr")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.flaky}")
    before = Flaky.count
    remote = train(configure(url, "remote"))
    assert Flaky.count - before > 40
    assert timeless(remote.metrics()) == timeless(local.metrics())
    assert timeless(remote.history()) == timeless(local.history())
    assert (remote.student / "tokenizer.json").read_bytes() == (
        local.student / "tokenizer.json"
    ).read_bytes()


def test_a_server_that_goes_ends_the_run_in_one_message_with_its_checkpoint(
    server: Server, cache: Cache, student_config: Path, tmp_path: Path
) -> None:
    url, run = upload(cache, "s3://bucket/mix.zarr"), tmp_path / "run"
    words = ["--steps", 100_000, "--interval", 20, "--rows", 4, "--eval-rows", 2]
    environment = os.environ | {"DDK_PATIENCE": "3"}
    process = command(
        "ddk-train", "run", url, run, "--student", student_config, *words, env=environment
    )
    deadline = time.monotonic() + 100
    while not list(run.glob("checkpoints/step-*[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.05)
    server.kill()
    began = time.monotonic()
    assert "cannot be reached" in failure(process)
    assert time.monotonic() - began < 60
    for checkpoint in run.glob("checkpoints/step-*[0-9]"):
        assert (checkpoint / "state.json").exists()
        assert (checkpoint / "torch.pt").exists()


def test_a_server_that_is_gone_is_said_within_the_bound(server: Server) -> None:
    server.kill()
    began = time.monotonic()
    with pytest.raises(StorageError, match="cannot be reached"):
        RemoteStorage("s3://bucket/mix.zarr", patience=2).get("zarr.json")
    assert time.monotonic() - began < 20
