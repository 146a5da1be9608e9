"""Whether the code is right on this device: the tests that need a GPU, one line per test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from benches.gpu.job import Job

ROOT = Path(__file__).parents[3]

SHORT = "tests/system/test_gpu.py::test_random_states_come_back"
"""A test that takes no time."""

LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


def measure(job: Job) -> None:
    """Run `pytest -m gpu` over all tests, or where sizes are tiny over one, on this device."""
    where = SHORT if job.tiny else "tests"
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "-p", "no:cacheprovider", where]
    # cuBLAS adds in one order only with a workspace that is fixed before it starts.
    fixed = {"DDK_TEST_DEVICE": str(job.device), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment = os.environ | fixed
    seconds = max(1.0, job.end - time.monotonic())
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        said = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode() + "\nstopped: the time was over"
        job.leave_out("the tests after the last one shown: the time was over")
    results = [{"test": test, "result": result} for test, result in LINE.findall(said)]
    job.record.table("tests that need a GPU", results)
    failed = [row for row in results if row["result"] in ("FAILED", "ERROR")]
    if failed or not results:
        job.record.console.print(said[-20_000:], highlight=False, markup=False)
    job.record.facts["output"] = said[-20_000:]
    job.goal("failed tests", len(failed), most=0)
    job.goal("passed tests", sum(row["result"] == "PASSED" for row in results), least=1)
