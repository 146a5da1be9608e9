"""A build onto an object store: the bytes of a local build, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_cache import InputError, MismatchError, owner
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.build.teacher import Teacher
from ddk_cache.errors import StorageError
from ddk_cache.inspect.verify import drop_bad, verify
from ddk_cache.read.cache import Cache, open_cache
from ddk_cache.storage.lease import Leases
from ddk_cache.storage.remote import RemoteStorage
from ddk_cache.testing import BUILD, VOCAB, random_teacher
from tests.helpers import BUILDER, VICTIMS, command, failure, finish, grow, lines, quiet, tree
from tests.s3 import Flaky, Server

Make = Callable[..., Cache]
URL = "s3://bucket/mix.zarr"


def contents(url: str = URL) -> dict[str, bytes | None]:
    """Return every object below a URL with its bytes."""
    bucket = RemoteStorage(url)
    return {name: bucket.get(name) for name in sorted(bucket.list_prefix(""))}


@contextmanager
def builder(corpus: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Give a process that builds, from when it begins to."""
    words = [sys.executable, "-c", BUILDER, URL, str(corpus)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as worker:
        assert worker.stdout
        worker.stdout.readline()
        yield worker


def wait_for(count: int, folder: str) -> None:
    """Wait until so many objects lie below a folder."""
    bucket, deadline = RemoteStorage(URL), time.monotonic() + 100
    while len(list(bucket.list_prefix(folder))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_build_onto_a_store_is_that_in_a_directory_and_goes_on(
    server: Server, cache: Cache, make_cache: Make
) -> None:
    make_cache(URL)
    assert contents() == tree(cache.root)
    assert not verify(open_cache(URL), quiet)

    def fail(tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the teacher was asked again")

    make_cache(URL, teacher=Teacher(fail, VOCAB, random_teacher().identity))
    with pytest.raises(MismatchError, match=f"{URL} was begun with other settings"):
        make_cache(URL, seq_len=8)
    assert contents() == tree(cache.root)


def test_a_file_url_gets_the_same_bytes(cache: Cache, make_cache: Make, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    make_cache(f"file://{tmp_path}")
    assert tree(tmp_path) == tree(cache.root)


def test_a_place_that_holds_something_else_is_left_alone(server: Server, make_cache: Make) -> None:
    RemoteStorage(URL).put("thesis.txt", b"years of work")
    with pytest.raises(InputError, match="exists and is not a cache"):
        make_cache(URL)
    with pytest.raises(StorageError, match="404 Not Found"):
        make_cache("s3://elsewhere/mix.zarr")
    assert contents() == {"thesis.txt": b"years of work"}


def test_every_tenth_request_may_fail(
    server: Server, cache: Cache, make_cache: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.flaky}")
    before = Flaky.count
    make_cache(URL)
    assert Flaky.count - before > 200
    assert contents() == tree(cache.root)


def test_two_processes_share_the_work(server: Server, cache: Cache, corpus: Path) -> None:
    with builder(corpus) as one, builder(corpus) as two:
        assert [one.wait(200), two.wait(200)] == [0, 0]
    assert contents() == tree(cache.root)


def test_kill_9_loses_nothing_committed_and_the_end_is_the_same_bytes(
    server: Server, cache: Cache, corpus: Path
) -> None:
    committed: dict[str, bytes | None] = {}
    for count, folder in ((1, "domains"), (1, "plans"), (1, "commits"), (6, "commits")):
        with builder(corpus) as worker:
            wait_for(count, folder)
            worker.kill()
        now = contents()
        assert {name: now.get(name) for name in committed} == committed
        committed = {name: data for name, data in now.items() if name.startswith("commits")}
    assert 6 <= len(committed) < len(cache.manifest.shards())
    with builder(corpus) as worker:
        assert worker.wait(200) == 0
    assert contents() == tree(cache.root)


@pytest.mark.parametrize("victim", VICTIMS[:1] + VICTIMS[2:3] + VICTIMS[4:5] + VICTIMS[7:])
def test_what_is_bad_is_dropped_and_made_again(
    victim: str, server: Server, cache: Cache, make_cache: Make
) -> None:
    bucket = RemoteStorage(URL)
    for name, data in tree(cache.root).items():
        bucket.put(name, data if name != victim else data[:-3] + b"?" + data[-2:])
    opened = open_cache(URL)
    problems = verify(opened, quiet)
    assert [problem.name for problem in problems] == [victim]
    assert drop_bad(opened, problems)
    make_cache(URL)
    assert contents() == tree(cache.root)


def test_damaged_rows_that_wait_for_the_teacher_are_found(
    server: Server, cache: Cache, make_cache: Make
) -> None:
    make_cache(URL)
    bucket, victim = RemoteStorage(URL), VICTIMS[2]
    bucket.delete("commits/digits/train/0.json")
    bucket.put(victim, b"?" + (bucket.get(victim) or b"")[1:])
    opened = open_cache(URL, unfinished=True)
    assert [problem.name for problem in verify(opened, quiet)] == [victim]
    drop_bad(opened, verify(opened, quiet))
    make_cache(URL)
    assert contents() == tree(cache.root)


def test_a_cache_grows_on_a_store(server: Server, tokenizer: Any, tmp_path: Path) -> None:
    growing, places = tmp_path / "corpus", (tmp_path / "mix.zarr", URL)
    growing.mkdir()
    (growing / "one.jsonl").write_text(lines(0, 40, "abc"))
    for place in places:
        build_cache(place, growing, random_teacher(), tokenizer, BuildConfig(**BUILD))
    grow(growing)
    for place in places:
        build_cache(place, growing, random_teacher(), tokenizer, BuildConfig(**BUILD), grow=True)
    assert contents() == tree(tmp_path / "mix.zarr")


def test_a_server_that_goes_ends_the_build_in_one_message_and_it_goes_on_later(
    server: Server, corpus: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    how = ["--teacher", teacher_dir, "--seq-len", 16, "--chunk-rows", 2, "--shard-rows", 4]
    how += ["--batch-rows", 1]
    environment = os.environ | {"DDK_PATIENCE": "3"}
    worker = command("ddk-cache", "build", corpus, URL, *how, env=environment)
    wait_for(2, "commits")
    server.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    said = failure(worker)
    assert time.monotonic() - began < 60
    assert f"{URL}/" in said
    assert "run the same command again to resume" in said
    server.process.send_signal(signal.SIGCONT)
    for place in (URL, tmp_path / "mix.zarr"):
        code, _, err = finish(command("ddk-cache", "build", corpus, place, *how))
        assert code == 0, err
    assert contents() == tree(tmp_path / "mix.zarr")
    code, out, err = finish(command("ddk-cache", "estimate", corpus, URL, *how[:-2]))
    assert code == 0, err
    assert "are free" not in out


def test_a_claim_on_a_store_is_free_when_its_lease_is_out(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "LEASE", 4.0)
    monkeypatch.setattr("ddk_cache.storage.lease.BEAT", 0.0)
    bucket, mine = RemoteStorage(URL), Leases(RemoteStorage(URL))
    bucket.put("claims/work", b"far-away+12+345")
    assert not mine.take("work")
    assert mine.take("other")
    time.sleep(5)
    assert mine.take("work")
    assert not mine.take("work")
    assert bucket.get("claims/work") == owner.current().encode()
    mine.beat()
    found = bucket.get_with_age("claims/other")
    assert found
    assert found[1] < 4
    bucket.put("claims/other", b"far-away+12+345")
    mine.beat()
    assert bucket.get("claims/other") == b"far-away+12+345"
    mine.release_all()
    assert contents() == {"claims/other": b"far-away+12+345"}
