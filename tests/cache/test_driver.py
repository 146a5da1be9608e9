"""A build by the workers of a Ray cluster: the same bytes, whoever is lost on the way.

Ray answers on the address of the machine, not on 127.0.0.1 alone, so these tests give it a network
of its own where the system allows that.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ddk_cache import InputError
from ddk_cache.build.config import BuildConfig
from ddk_cache.cli import main
from ddk_cache.cluster.driver import room
from ddk_cache.cluster.order import Order
from ddk_cache.format.layout import COMMITS
from ddk_cache.models.config import TeacherConfig
from ddk_cache.testing import BUILD
from tests.helpers import call, jsonl, tree

ALONE = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""Runs a command without any network but 127.0.0.1."""

KILLER = """
import pickle, sys, threading, time
from pathlib import Path
import psutil, ray
from ddk_cache.cluster.driver import Crew, cluster

order = pickle.loads(Path(sys.argv[1]).read_bytes())

def committed():
    return len(list(Path(order.cache).glob("commits/*/*/*.json")))

def wait(more):
    wanted = committed() + more
    while committed() < wanted:
        time.sleep(0.05)

def strike(crew):
    wait(3)
    below = psutil.Process().children(recursive=True)
    next(process for process in below if "ray::Worker" in "".join(process.cmdline())).kill()
    print("one killed", flush=True)
    wait(3)
    ray.kill(list(crew.builds.values())[-1][0])
    print("one removed", flush=True)

with cluster("local"):
    crew = Crew(order.absolute(), 2, {"num_cpus": 1.0})
    threading.Thread(target=strike, args=(crew,), daemon=True).start()
    crew.run()
print("one finished")
"""
"""Builds the order in the file argv[1] with two workers, of which it kills both in turn."""


def can_be_alone() -> bool:
    done = subprocess.run([*ALONE, "true"], capture_output=True, check=False)
    return done.returncode == 0


def start(*words: object) -> subprocess.Popen[str]:
    """Start Python with these words, in a process group and, where possible, a network alone."""
    command = [*(ALONE if can_be_alone() else []), sys.executable, *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


# --- how many workers, of what --------------------------------------------------------------------

CPUS = [{"CPU": 8.0}, {"CPU": 4.0}, {"memory": 1.0}]
GPUS = [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 3.0}, {"CPU": 4.0}]


@pytest.mark.parametrize(
    ("machines", "workers", "gpus", "found"),
    [
        (CPUS, None, None, ({"num_cpus": 4.0}, 2)),
        (CPUS, 4, None, ({"num_cpus": 3.0}, 4)),
        (CPUS, 50, None, ({"num_cpus": 1.0}, 50)),
        (GPUS, None, None, ({"num_cpus": 1.0, "num_gpus": 1.0}, 11)),
        (GPUS, None, 2.0, ({"num_cpus": 1.0, "num_gpus": 2.0}, 5)),
        (GPUS, None, 0.5, ({"num_cpus": 1.0, "num_gpus": 0.5}, 22)),
        (GPUS, None, 0.0, ({"num_cpus": 4.0}, 3)),
        (CPUS, 3, 1.0, ({"num_cpus": 1.0, "num_gpus": 1.0}, 3)),
    ],
)
def test_there_are_as_many_workers_as_there_is_room_for(
    machines: Any, workers: int | None, gpus: float | None, found: object
) -> None:
    assert room(machines, workers, gpus) == found


def test_gpus_that_nobody_has_are_refused() -> None:
    with pytest.raises(InputError, match="got 16, and no machine of the cluster has so many"):
        room(GPUS, None, 16.0)


# --- wrong calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--workers 2", "--workers and --gpus-per-worker are for --ray"),
        ("--gpus-per-worker 1", "are for --ray"),
        ("--ray local --rank 0 --world 2", "--ray counts its own workers"),
        ("--ray nonsense", "expected the address of a running Ray cluster"),
        ("--ray 127.0.0.1:1", "Connection refused"),
    ],
)
def test_wrong_calls_are_refused(
    words: str, message: str, corpus: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    if "--ray" in words:
        pytest.importorskip("ray")
    place = tmp_path / "mix.zarr"
    result = call(main, "build", corpus, place, "--teacher", teacher_dir, *words.split())
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not place.exists()


# --- builds ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Order:
    """An order of more than a hundred shards, carried out by one process."""
    generator, folder = random.Random(0), tmp_path_factory.mktemp("alone")
    (folder / "corpus").mkdir()
    for name, count in (("large", 300), ("small", 60)):
        texts = ["".join(generator.choices("abcdef ", k=50)) for _ in range(count)]
        lines = jsonl({"text": text} for text in texts)
        (folder / "corpus" / f"{name}.jsonl").write_text(lines)
    order = Order(
        corpus=folder / "corpus", cache=str(folder / "mix.zarr"), teacher=str(teacher_dir),
        tokenizer=None, config=BuildConfig(**BUILD), how=TeacherConfig(device="cpu"), grow=False,
    )  # fmt: skip
    order.build()
    return order


@pytest.mark.slow
def test_killed_workers_are_replaced_and_change_no_byte(alone: Order, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    order = dataclasses.replace(alone, cache=str(tmp_path / "mix.zarr"))
    (tmp_path / "order").write_bytes(pickle.dumps(order))
    process = start("-c", KILLER, tmp_path / "order")
    out, err = process.communicate(timeout=290)
    assert process.returncode == 0, err
    told = [line for line in out.splitlines() if line.startswith("one ")]
    assert told == ["one killed", "one removed", "one finished"]
    assert "is replaced: it is gone" in err
    assert tree(Path(order.cache)) == tree(Path(alone.cache))


@pytest.mark.slow
def test_a_stopped_driver_lets_workers_finish_and_is_started_again(
    alone: Order, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    cache, code = (
        tmp_path / "mix.zarr",
        "from ddk_cache.cli import main; main(prog_name='ddk-cache')",
    )
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in BUILD.items()]
    words = ["build", alone.corpus, cache, "--teacher", alone.teacher, "--device", "cpu", *settings]
    words += ["--ray", "local", "--workers", 2]
    first = start("-c", code, *words)
    await_commits(cache, 5)
    os.killpg(first.pid, signal.SIGINT)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 1, err
    assert "the workers finish their shards" in err
    assert "committed. Run the same command again to resume." in err
    assert not list(cache.glob("claims/*"))
    second = start("-c", code, *words)
    _, err = second.communicate(timeout=200)
    assert second.returncode == 0, err
    assert "2 workers of 1 CPU; dashboard: http://" in err
    assert tree(cache) == tree(Path(alone.cache))


def await_commits(cache: Path, count: int) -> None:
    """Wait until so many shards of a cache are committed."""
    deadline = time.monotonic() + 120
    while len(list(cache.glob(f"{COMMITS}/*/*/*.json"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
