"""Kill a training run again and again; in the end it is the run that nobody killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from ddk_cache.errors import DDKError
from ddk_cache.hashing import digest
from ddk_cache.testing import VOCAB
from ddk_train.run.directory import Run
from stress_tests.material import PATIENCE, Chance, make_cache
from stress_tests.report import Report, measurement

STUDENT = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB,
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_dropout": 0.1,
    "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
"""With dropout, so that random states matter."""

OPTIONS = {
    "steps": 300, "interval": 20, "checkpoint-every": 7, "rows": 6, "micro-rows": 4,
    "eval-rows": 5, "lr": 3e-3, "log-every": 1, "device": "cpu",
}  # fmt: skip

CLOCK = {"seconds", "tokens_per_second", "wait", "eval_share", "eval_seconds"}
"""Metrics that depend on the clock."""


def start(cache: Path, run: Path, student: Path) -> subprocess.Popen[str]:
    """Start or resume a run in a process of its own."""
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    words = [str(cache), str(run), "--student", str(student), *options]
    return subprocess.Popen(
        [sys.executable, "-m", "ddk_train", "run", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def end(process: subprocess.Popen[str], wrong: list[str]) -> bool:
    """Wait for a run; return whether it came to its own end."""
    _, err = process.communicate(timeout=PATIENCE)
    if process.returncode not in (0, -signal.SIGKILL):
        wrong.append(f"a run exited with {process.returncode}: {err.strip()[-300:]}")
    return process.returncode == 0


def outcome(path: Path) -> dict[str, Any]:
    """Return everything that a run left which is not the clock's."""
    run = Run(path)
    step, last = run.checkpoints()[-1]
    state = json.loads((last / "state.json").read_text())
    return {
        "metrics": [{k: v for k, v in m.items() if k not in CLOCK} for m in run.metrics()],
        "history": [{k: v for k, v in m.items() if k not in CLOCK} for m in run.history()],
        "student": digest((run.student / "model.safetensors").read_bytes()),
        "optimizer and random states": digest((last / "torch.pt").read_bytes()),
        "checkpoint": step,
        "state": {k: v for k, v in state.items() if k not in CLOCK},
        "left over": sorted(str(p.relative_to(path)) for p in path.rglob("*.partial")),
    }


def strike(process: subprocess.Popen[str], run: Path, chance: Chance) -> str:
    """Kill a run at a random moment, most often while it trains; return what it was doing."""
    metrics, began = run / "metrics.jsonl", time.monotonic()
    size = metrics.stat().st_size if metrics.exists() else 0
    if chance.random() < 0.8:
        while process.poll() is None and time.monotonic() - began < PATIENCE:
            if metrics.exists() and metrics.stat().st_size not in (0, size):
                break
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 2))
    else:
        time.sleep(chance.uniform(0, 8))
    process.kill()
    if list(run.glob("checkpoints/*.partial")):
        return "saving"
    if metrics.exists() and metrics.stat().st_size != size:
        return "training"
    return "starting"


@measurement
@click.option("--kills", default=20)
def train(work: Path, seed: int, kills: int) -> Report:
    """Kill a run at random moments and resume it; its end is that of an uninterrupted one."""
    report, chance, phases, runs = Report(), Chance(seed), Counter[str](), 0
    cache, student, path = make_cache(work, documents=20), work / "student.json", work / "run"
    student.write_text(json.dumps(STUDENT))
    if not end(start(cache, work / "whole", student), report.wrong):
        raise DDKError(f"the uninterrupted run failed: {report.wrong}")
    right = outcome(work / "whole")
    while phases.total() < kills or path.exists():
        process = start(cache, path, student)
        phase = strike(process, path, chance) if phases.total() < kills else ""
        if not end(process, report.wrong):
            if process.returncode != -signal.SIGKILL:
                break
            phases[phase] += 1
            continue
        found, runs = outcome(path), runs + 1
        report.wrong += [f"{name} differs" for name in right if found[name] != right[name]]
        shutil.rmtree(path)
    report.figures = {"kills": phases.total(), **phases, "runs brought to their end": runs}
    return report
