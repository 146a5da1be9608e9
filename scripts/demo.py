"""The whole job: documents → teacher → cache → two students → report.

Runs and shows the commands that a user types. The student with a live teacher, whose cost is
compared, is trained through the library, because no command offers it. What .demo already contains
is used again.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from demo_material import SEQ_LEN, make_material
from rich.console import Console
from rich.table import Table

from ddk_cache import SparseTargets, load_teacher, open_cache
from ddk_cache.build import targets
from ddk_cache.console import duration, say
from ddk_cache.format.spec import TargetSpec
from ddk_cache.inspect.describe import describe
from ddk_train import TrainConfig, train
from ddk_train.run.directory import Run, open_run

DEMO = Path(".demo")
TARGETS = "sampled:24"
STUDENT = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SETTINGS: dict[str, Any] = {
    "steps": 240,
    "interval": 40,
    "rows": 16,
    "eval_rows": 40,
    "lr": 3e-3,
    "warmup": 20,
    "log_every": 1,
}
LIVE_STEPS = 40
"""Steps with the live teacher: enough for a median."""


def shell(*words: object) -> None:
    """Show a command, and run it."""
    line = [str(word) for word in words]
    say(f"\n$ {shlex.join(line)}")
    program = Path(sys.executable).parent / line[0]
    done = subprocess.run([program, *line[1:]], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def options(settings: dict[str, Any]) -> list[str]:
    """Write settings as the options of a command."""
    return [
        word
        for name, value in settings.items()
        for word in ("--" + name.replace("_", "-"), str(value))
    ]


def train_with_live_teacher(cache: Path, student: Path, teacher: Path) -> Run:
    """Train a few steps with the teacher in the loop; everything else is as from the cache."""
    model = load_teacher(str(teacher))
    spec = TargetSpec.parse(TARGETS)

    @torch.inference_mode()
    def live(tokens: torch.Tensor) -> SparseTargets[torch.Tensor]:
        scores = targets.extract(model.logits(tokens[:, :-1]), tokens[:, 1:], spec)
        return targets.Scores(*(part.clone() for part in scores)).targets(spec.kind)

    settings = SETTINGS | {"steps": LIVE_STEPS, "interval": LIVE_STEPS, "eval_rows": 1}
    paths: dict[str, Any] = {
        "cache": str(cache),
        "run": str(DEMO / "runs/live"),
        "student": str(student),
    }
    say("\nThe same steps with the teacher in the loop, to compare the cost")
    return train(TrainConfig(**paths, **settings), live=live)


def seconds_per_step(run: Run) -> float:
    """Return the median of the first steps of a run, without the first."""
    elapsed: list[float] = [line["seconds"] for line in run.metrics()[:LIVE_STEPS]]
    return statistics.median(b - a for a, b in itertools.pairwise(elapsed))


def perplexities(run: Run, step: int, model: str) -> dict[str, float]:
    """Return the perplexity of each domain at a measurement."""
    return {
        row["domain"]: math.exp(row[f"{model}_loss"])
        for row in run.history()
        if row["step"] == step
    }


def show(excess: Run, uniform: Run) -> None:
    """Print the table of domains."""
    last = SETTINGS["steps"]
    weights = {row["domain"]: row["weight"] for row in excess.history() if row["step"] == last}
    table = Table("perplexity on held-out rows", box=None, pad_edge=False)
    for column in ("teacher", "before", "after (excess)", "after (uniform)", "last weight"):
        table.add_column(column, justify="right")
    columns = (
        perplexities(excess, 0, "teacher"),
        perplexities(excess, 0, "student"),
        perplexities(excess, last, "student"),
        perplexities(uniform, last, "student"),
    )
    for domain, weight in weights.items():
        table.add_row(domain, *(f"{column[domain]:,.1f}" for column in columns), f"{weight:.3f}")
    Console().print(table)


def main() -> None:
    """Run the demo."""
    began = time.monotonic()
    material = make_material(DEMO)
    cache, student, page = DEMO / "mix.zarr", DEMO / "student.json", DEMO / "report.html"
    student.write_text(json.dumps(STUDENT))
    (DEMO / "runs").mkdir(exist_ok=True)
    words = [material.corpus, cache, "--teacher", material.teacher]
    words += ["--seq-len", SEQ_LEN, "--targets", TARGETS]
    shell("ddk-cache", "estimate", *words)
    shell("ddk-cache", "build", *words)
    shell("ddk-cache", "info", cache)
    shell("ddk-cache", "verify", cache)
    runs = {}
    for weighting in ("excess", "uniform"):
        path = DEMO / "runs" / weighting
        settings = ["--student", student, "--weighting", weighting, *options(SETTINGS)]
        shell("ddk-train", "run", cache, path, *settings)
        runs[weighting] = open_run(path)
    live = train_with_live_teacher(cache, student, material.teacher)
    shell("ddk-train", "report", *(run.path for run in runs.values()), "--html", page)
    print()
    show(runs["excess"], runs["uniform"])
    facts = describe(open_cache(cache))
    cached, alive = seconds_per_step(runs["excess"]), seconds_per_step(live)
    size = facts["bytes_per_token"]["all"]
    print(f"\ncache: {facts['tokens']:,} tokens, {size:.1f} bytes per token")
    print(f"seconds per step: {cached:.3f} from the cache, {alive:.3f} with the live teacher")
    print(f"page: {page.resolve()}")
    say(f"\nDone in {duration(time.monotonic() - began)}.")


if __name__ == "__main__":
    main()
