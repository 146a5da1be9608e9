"""Two processes, started by accelerate, end with the update of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from ddk_cache import InputError
from ddk_cache.read.cache import Cache
from ddk_train import train
from ddk_train.distributed import Processes, peak_memory
from ddk_train.run.directory import Run
from tests.helpers import RUN, Configure, command, finish
from tests.sequences import Material

ROOT = Path(__file__).parents[2]


def launch(processes: int, *words: object) -> tuple[int, str]:
    """Run `ddk-train` in several CPU processes; return the exit code and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # To accelerate, several processes of one machine are "multi_gpu", also on CPUs.
    start = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 1),
        *("--num_processes", processes, "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", port, "-m", "ddk_train"),
    ]
    done = subprocess.run(
        [str(word) for word in (*start, *words)],
        capture_output=True, text=True, timeout=240, cwd=ROOT, check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    return done.returncode, done.stderr


def test_two_processes_give_the_update_of_one(
    configure: Configure, cache: Cache, student_config: Path, tmp_path: Path
) -> None:
    settings = RUN | {"steps": 5, "interval": 2, "micro_rows": 2}
    options = [word for key, value in settings.items()
               for word in ("--" + key.replace("_", "-"), value)]  # fmt: skip
    one = train(configure("one", **settings))
    words = ["run", cache.root, tmp_path / "two", "--student", student_config]
    words += [*options, "--device", "cpu"]
    code, err = launch(2, *words)
    assert code == 0, err
    two = Run(tmp_path / "two")
    assert [line["step"] for line in two.metrics()] == [1, 2, 3, 4, 5]
    for name in ("loss", "ce", "kl", "grad_norm"):
        mine, theirs = ([line[name] for line in run.metrics()] for run in (one, two))
        np.testing.assert_allclose(mine, theirs, rtol=1e-4)
    assert len(two.history()) == len(one.history())
    for a, b in zip(one.history(), two.history(), strict=True):
        assert a["rows_seen"] == b["rows_seen"]
        assert abs(a["student_loss"] - b["student_loss"]) < 1e-4
    students = [load_file(run.student / "model.safetensors") for run in (one, two)]
    for name in students[0]:
        torch.testing.assert_close(students[0][name], students[1][name], rtol=1e-3, atol=2e-4)
    code, err = launch(2, *words)
    assert code == 0, err
    assert err.count("resuming after step 5 of 5") == 1


@pytest.mark.slow
@pytest.mark.parametrize("rows_weight", [0.0, 0.5])
def test_two_processes_learn_from_pairs_as_one(
    rows_weight: float, material: Material, tmp_path: Path
) -> None:
    settings = RUN | {"steps": 4, "interval": 2, "micro_rows": 2, "rows": 4}
    settings |= {"pairs": "dpkd", "pair_rows": 8, "rows_weight": rows_weight}
    options = [word for key, value in settings.items()
               for word in ("--" + key.replace("_", "-"), value)]  # fmt: skip
    words = {
        name: ["run", material.cache, tmp_path / name, "--student", material.folder / "student",
               *options, "--device", "cpu"]
        for name in ("one", "two")
    }  # fmt: skip
    code, _, err = finish(command("ddk-train", *words["one"]))
    assert code == 0, err
    code, err = launch(2, *words["two"])
    assert code == 0, err
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    for name in ("loss", "pair_loss", "margin", "preferred", "grad_norm", "tokens"):
        mine, theirs = ([line[name] for line in run.metrics()] for run in (one, two))
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)
    for a, b in zip(one.history(), two.history(), strict=True):
        assert a["rows_seen"] == b["rows_seen"]
        assert abs(a["margin"] - b["margin"]) < 1e-4


def test_rows_that_cannot_be_shared_are_refused(
    cache: Cache, student_config: Path, tmp_path: Path
) -> None:
    words = ["run", cache.root, tmp_path / "run", "--student", student_config, "--rows", 5]
    words += ["--device", "cpu"]
    code, err = launch(2, *words)
    assert code
    assert "5 rows per step cannot be shared evenly by 2 processes" in err


def test_torchrun_on_a_cpu_makes_ranks_of_one_run(
    cache: Cache, student_config: Path, tmp_path: Path
) -> None:
    words = ["run", cache.root, tmp_path / "run", "--student", student_config, "--rows", 4]
    words += ["--steps", 2, "--interval", 2, "--log-every", 1, "--eval-rows", 2]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = subprocess.run(
        [str(word) for word in (*start, "-m", "ddk_train", *words)],
        capture_output=True, text=True, timeout=240, cwd=ROOT, check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in Run(tmp_path / "run").metrics()] == [1, 2]
    code, _, err = finish(command("ddk-train", *words))
    assert code == 0, err
    assert "resumed in 1 process(es) instead of 2" in err


def test_sharded_weights_are_refused_by_name(configure: Configure) -> None:
    for option, name in (("--use_fsdp", "FSDP"), ("--use_deepspeed", "DeepSpeed")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(f"ACCELERATE_{option[2:].upper()}", "true")
            with pytest.raises(InputError, match=f"{name} is not supported: the loss"):
                Processes(configure())


def test_a_damaged_world_size_is_named(cache: Cache, student_config: Path, tmp_path: Path) -> None:
    words = ["run", cache.root, tmp_path / "run", "--student", student_config]
    process = command("ddk-train", *words, env=os.environ | {"WORLD_SIZE": "x"})
    code, _, err = finish(process)
    assert code == 2
    assert "WORLD_SIZE: got 'x', expected a number of processes" in err
    assert "Traceback" not in err


def test_peak_memory_is_in_bytes() -> None:
    now = psutil.Process().memory_info().rss
    assert now / 2 < peak_memory(torch.device("cpu")) < psutil.virtual_memory().total
