"""Several processes build one cache: the same bytes, and nobody's work twice."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddk_cache import owner
from ddk_cache.owner import current
from ddk_cache.read.cache import Cache
from ddk_cache.storage.lease import Leases
from ddk_cache.storage.local import LocalStorage
from tests.helpers import BUILDER, tree


def test_three_processes_build_the_same_cache_as_one(
    corpus: Path, cache: Cache, tmp_path: Path
) -> None:
    path = tmp_path / "mix.zarr"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER, str(path), str(corpus)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    for worker in workers:
        _, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err.decode()
    assert tree(path) == tree(cache.root)


def test_a_claim_is_exclusive_until_its_owner_is_gone(tmp_path: Path) -> None:
    mine, also_mine = Leases(LocalStorage(tmp_path)), Leases(LocalStorage(tmp_path))
    assert mine.take("work")
    assert not mine.take("work")
    assert not also_mine.take("work")
    mine.release("work")
    assert also_mine.take("work")
    code = (
        "from ddk_cache.storage.lease import Leases\n"
        "from ddk_cache.storage.open import open_storage\n"
        f"assert Leases(open_storage({str(tmp_path)!r})).take('other')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "claims" / "other").exists()
    assert mine.take("other")


def test_a_claim_from_another_machine_expires_with_its_lease(tmp_path: Path) -> None:
    mine, elsewhere = Leases(LocalStorage(tmp_path)), tmp_path / "claims" / "work"
    elsewhere.parent.mkdir()
    elsewhere.write_text("far-away+12+345")
    assert not mine.take("work")
    os.utime(elsewhere, (0, 0))
    assert mine.take("work")
    assert elsewhere.read_text() == current()


def test_a_lease_dated_in_the_future_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "LEASE", 0.4)
    mine, elsewhere = Leases(LocalStorage(tmp_path)), tmp_path / "claims" / "work"
    elsewhere.parent.mkdir()
    elsewhere.write_text("far-away+12+345")
    tomorrow = time.time() + 86400
    os.utime(elsewhere, (tomorrow, tomorrow))
    assert not mine.take("work")
    time.sleep(0.3)
    os.utime(elsewhere, (tomorrow + 15, tomorrow + 15))  # its owner lives and renews it
    assert not mine.take("work")
    time.sleep(0.3)
    assert not mine.take("work")
    time.sleep(0.3)
    assert mine.take("work")


def test_whoever_is_waited_for_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ddk_cache")
    mine, folder = Leases(LocalStorage(tmp_path)), tmp_path / "claims"
    folder.mkdir()
    for name in ("code.train.3", "code.train.4"):
        (folder / name).write_text("far-away+12+345")
        written = time.time() - 20
        os.utime(folder / name, (written, written))
    for _ in range(3):
        assert not mine.take("code.train.3")
        assert not mine.take("code.train.4")
    (message,) = caplog.messages
    assert "code.train.3 is leased by another machine, far-away, which renewed" in message
    assert "20 s ago" in message
    assert "taken over in 100 s" in message


def test_leases_of_others_are_seen(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    mine, other = Leases(storage), Leases(storage)
    assert not mine.others()
    assert mine.take("a")
    assert not mine.others()
    assert other.others()
    storage.put("claims/b", b"gone+99999999+1")
    assert mine.others()  # of another host, and young
