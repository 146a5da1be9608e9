"""Which process owns a file, and whether it lives."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddk_cache import owner


def test_this_process_lives_and_a_finished_one_does_not() -> None:
    assert owner.is_name(owner.current())
    assert owner.alive(owner.current(), math.inf)
    code = "from ddk_cache import owner; print(owner.current())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert owner.is_name(done.stdout.strip())
    assert not owner.alive(done.stdout.strip(), 0.0)


def test_another_process_of_our_number_is_not_us() -> None:
    host, pid, start = owner.current().split("+")
    assert not owner.alive(f"{host}+{pid}+{int(start) - 1000}", 0.0)


def test_elsewhere_only_the_age_tells() -> None:
    assert owner.is_elsewhere("far-away+1+2")
    assert owner.host_of("far-away+1+2") == "far-away"
    assert not owner.is_elsewhere(owner.current())
    assert owner.alive("far-away+1+2", owner.LEASE - 1)
    assert not owner.alive("far-away+1+2", owner.LEASE + 1)


@pytest.mark.parametrize("text", ["", "movie", "a+b+c", "host+1", "host+1+2+3", "+1+2"])
def test_what_is_not_a_name_of_a_process(text: str) -> None:
    assert not owner.is_name(text)


def test_the_age_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert owner.age(path) == math.inf
    path.touch()
    os.utime(path, (1000, 1000))
    assert owner.age(path) > 10**9
