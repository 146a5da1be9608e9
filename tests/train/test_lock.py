"""One process at a time: a second is refused by name, a dead one is no obstacle."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddk_cache import InputError, owner
from ddk_train.run.lock import locked


def test_a_second_holder_is_refused_by_name_until_the_first_is_done(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        assert path.read_text() == owner.current()
        with pytest.raises(InputError, match=rf"in use by another run \(process {os.getpid()} on"):
            locked(path).__enter__()
    assert list(tmp_path.iterdir()) == []
    with locked(path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import os, sys; from pathlib import Path; from ddk_train.run.lock import locked\n"
        "held = locked(Path(sys.argv[1])); held.__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=False)
    assert path.exists()
    with locked(path):
        assert path.read_text() == owner.current()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_host_counts_while_it_is_renewed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("elsewhere+12+34")
    with pytest.raises(InputError, match=r"process 12 on elsewhere"):
        locked(path).__enter__()
    old = time.time() - owner.LEASE - 1
    os.utime(path, (old, old))
    with locked(path):
        assert path.read_text() == owner.current()


def test_a_lock_without_an_owner_is_taken_over_in_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_bytes(b"")
    os.utime(path, (0, 0))
    with locked(path):
        assert path.read_text() == owner.current()
