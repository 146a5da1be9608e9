"""A signal ends a run after its step, with a checkpoint; a second one at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ddk_cache.read.cache import Cache
from ddk_train.run.directory import open_run
from ddk_train.signals import stop_requests
from tests.helpers import command, finish


def test_the_first_signal_is_a_request_and_the_second_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_writes_a_checkpoint_and_says_how_to_go_on(
    number: signal.Signals, cache: Cache, student_config: Path, tmp_path: Path
) -> None:
    words: list[Any] = [
        "ddk-train",
        "run",
        cache.root,
        tmp_path / "run",
        "--student",
        student_config,
    ]
    words += ["--steps", 100_000, "--interval", 50_000, "--rows", 2, "--log-every", 1]
    process = command(*words)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 1
    assert "Run the same command again to resume where it stopped." in err
    assert "Traceback" not in err
    ((step, _),) = open_run(tmp_path / "run").checkpoints()
    assert f"stopped after step {step} of 100000" in err
