"""One teacher in two processes of torchrun gives the cache of one process, up to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddk_cache import load_teacher, open_cache
from ddk_cache.inspect.verify import replay
from ddk_cache.read.cache import Cache

PROGRAM = """
from ddk_cache.cli import main
main(prog_name="ddk-cache")
"""

SETTINGS = [
    "--seq-len",
    "16",
    "--holdout",
    "0.3",
    "--targets",
    "topk:8",
    "--chunk-rows",
    "2",
    "--shard-rows",
    "8",
]


def torchrun(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run `ddk-cache …` in two processes of torchrun."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launch, str(program), *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def targets(cache: Cache) -> dict[str, np.ndarray]:
    """Return the log-probabilities of the true tokens, by domain and split."""
    return {
        f"{domain}/{split}": cache.read(
            domain, split, cache.row_numbers(domain, split)
        ).label_logprob
        for domain in cache.domains
        for split in ("train", "validation")
    }


@pytest.mark.slow
def test_two_processes_build_the_cache_of_one(
    teacher_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    words = [corpus, tmp_path / "two.zarr", "--teacher", teacher_dir, *SETTINGS]
    done = torchrun(tmp_path, "build", *words, "--tensor-parallel", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is finished") == 1
    words[1] = tmp_path / "one.zarr"
    plain = subprocess.run(
        [sys.executable, "-c", PROGRAM, "build", *map(str, words)], capture_output=True, check=False
    )
    assert plain.returncode == 0, plain.stderr
    one, two = (open_cache(tmp_path / f"{name}.zarr") for name in ("one", "two"))
    assert one.spec == two.spec  # with the teacher's identity
    expected, found = targets(one), targets(two)
    for name, values in expected.items():
        # A step of what is stored, where rounding falls to the other side.
        np.testing.assert_allclose(found[name], values, atol=2.1 * one.logprob.error)
        assert (found[name] == values).mean() > 0.98
    assert not replay(two, load_teacher(teacher_dir), 8, 0).bad
    again = torchrun(tmp_path, "verify", two.root, "--teacher", teacher_dir, "--tensor-parallel", 2)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("teacher on") == 1


@pytest.mark.slow
def test_a_job_that_fails_ends_in_both_processes(
    teacher_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    words = [corpus, tmp_path / "x.zarr", "--teacher", teacher_dir, "--tensor-parallel", 2]
    done = torchrun(tmp_path, "build", *words, "--seq-len", 4096)
    assert done.returncode == 1
    assert done.stderr.count("Error: seq_len: got 4,096, expected at most 64") == 1
    assert not (tmp_path / "x.zarr").exists()
