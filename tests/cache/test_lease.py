"""Several processes build one cache: the same bytes, and nobody's work twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddk_cache import InputError
from ddk_cache.cli import which_process
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


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        ({}, (None, None), (0, 1)),
        ({}, (2, 4), (2, 4)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (None, None), (3, 8)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (0, 2), (0, 2)),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4"}, (None, None), (0, 4)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (None, None), (1, 2)),
    ],
)
def test_rank_and_world_come_from_the_launcher(
    names: dict[str, str], given: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert which_process(*given) == expected


@pytest.mark.parametrize("given", [(4, 4), (1, None)])
def test_a_rank_beyond_the_world_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="has to be below"):
        which_process(*given)
