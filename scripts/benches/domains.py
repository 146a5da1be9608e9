"""Where a student's tokens are best spent: the rules of domain weights, side by side.

A student is warmed by plain training, once for each seed; from there every method has the same
budget, the same cache and the same held-out rows, so that all comparisons over seeds are paired.
Each run is an ordinary run of `train` in `--work`, which `ddk-train report` can show; what is
finished there is not run again, so that a later call may add seeds or methods.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import torch
import yaml

from benches.common import Floats, Record, data, json_option, plus_minus, spread_of
from benches.shared import SEQ_LEN, STUDENT
from ddk_cache import InputError, MismatchError, SparseTargets, load_teacher, open_cache
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.console import say
from ddk_cache.hf import load_tokenizer
from ddk_train import TrainConfig, cut_student, train
from ddk_train.report.run_report import load
from ddk_train.run.directory import Run
from ddk_train.student.cut import parse_layers

METHODS: dict[str, dict[str, Any]] = {
    "CPT": {"gamma": 0.0, "weighting": "proportional"},
    "KD proportional": {"weighting": "proportional"},
    "KD uniform": {"weighting": "uniform"},
    "DDK, γ = 0": {"gamma": 0.0, "weighting": "ddk"},
    "DDK": {"weighting": "ddk"},
    "DDK, no smoothing": {"weighting": "eq1"},
    "DoReMi weights": {"weighting": "doremi"},
    "excess": {"weighting": "excess"},
    "excess, α = 1": {"weighting": "excess", "alpha": 1.0},
}
"""What differs from the settings of all; γ elsewhere is `--gamma`, α 0.5."""

BASE = "KD proportional"
"""What the others are compared with."""

LIVE = "DDK, live teacher"


@dataclass(frozen=True)
class Found:
    """The end of a run; arrays by domain (D)."""

    loss: Floats
    gap: Floats
    kl: Floats
    weight: Floats
    """Share of the rows drawn."""
    measuring: float
    """Share of the time spent on measuring gaps."""


@dataclass(frozen=True)
class Bench:
    """Where the runs are, and what is the same in all of them."""

    cache: Path
    student: Path
    """What every seed begins with, before it is warmed."""
    runs: Path
    settings: dict[str, Any]
    """Of `TrainConfig`."""
    warm: dict[str, Any]
    """What is different while a student is warmed."""

    def warmed(self, seed: int) -> Run:
        """Return the plain training from which every method of a seed starts."""
        changes = {"gamma": 0.0, "weighting": "proportional", **self.warm}
        return self.run(f"warm-{seed}", self.student, seed, changes)

    def method(self, name: str, changes: Mapping[str, Any], seed: int, live: Any = None) -> Found:
        """Return the end of a method's run."""
        folder = "".join(c if c.isalnum() or c == "." else "-" for c in name)
        return outcome(self.run(f"{folder}-{seed}", self.warmed(seed).student, seed, changes, live))

    def run(
        self, name: str, student: Path, seed: int, changes: Mapping[str, Any], live: Any = None
    ) -> Run:
        """Train, or find what an earlier call trained; only the finished student is kept."""
        run = Run(self.runs / name)
        paths = {"cache": str(self.cache), "run": str(run.path), "student": str(student)}
        config = TrainConfig(**paths | {"seed": seed} | self.settings | dict(changes))
        if not run.student.exists():
            say(f"\n{name}")
            train(config, live=live)
            shutil.rmtree(run.path / "checkpoints")
        elif run.config["settings"] != config.to_json():
            raise MismatchError(f"{run.path} was made with other settings. Give another --work.")
        return run


def outcome(run: Run) -> Found:
    """Read the end of a run from its directory."""
    (report,) = load([run.path])
    loss, gap, kl, rows = np.array(
        [(one.last_loss, one.gap, one.kl, one.rows) for one in report.domains], np.float64
    ).T
    return Found(loss, gap, kl, rows / rows.sum(), report.eval_share or 0.0)


# --- what is trained on ---


def make_cache(path: Path, place: Path, tokens: int, holdout: float, kind: str) -> None:
    """Build a cache of so many tokens of the corpus, its domains in their own proportions."""
    sizes = {file: pq.read_table(file)["text"].nbytes for file in place.glob("corpus/*.parquet")}
    shares = {
        file.stem: {"path": str(file), "tokens": round(tokens * size / sum(sizes.values()))}
        for file, size in sorted(sizes.items())
    }
    mix = path.with_name("corpus.yaml")
    mix.write_text(yaml.safe_dump({"domains": shares}))
    build_cache(
        path,
        mix,
        load_teacher(str(place / "teacher")),
        load_tokenizer(str(place / "teacher")),
        BuildConfig(seq_len=SEQ_LEN, targets=kind, holdout=holdout),
    )


def fresh_config(path: Path, vocab_size: int) -> None:
    """Write the config of a fresh student."""
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    path.write_text(json.dumps(kind | STUDENT | {"vocab_size": vocab_size}))


def full_distributions(teacher: Path) -> Callable[[torch.Tensor], SparseTargets[torch.Tensor]]:
    """Return the teacher in the loop: every id is kept, and nothing is rounded."""
    model = load_teacher(str(teacher))

    @torch.no_grad()
    def live(tokens_BS1: torch.Tensor) -> SparseTargets[torch.Tensor]:
        probs_BSV = model.logits(tokens_BS1[:, :-1]).float().softmax(-1)
        ids = torch.arange(probs_BSV.shape[-1], device=probs_BSV.device).expand_as(probs_BSV)
        return SparseTargets(ids, probs_BSV, torch.zeros_like(probs_BSV[..., 0]))

    return live


# --- figures ---


def summary(found: Mapping[str, Sequence[Found]]) -> list[dict[str, Any]]:
    """Return one row per method: means over domains, and the paired difference to `BASE`.

    The worst domain is the one that ends farthest above its teacher; its gap is shown.
    """
    rows = []
    for name, seeds in found.items():
        mean = np.array([one.loss.mean() for one in seeds])
        base = np.array([one.loss.mean() for one in found.get(BASE, seeds)])
        change = mean - base
        row = {
            "method": name,
            "mean loss": plus_minus(mean),
            "mean perplexity": plus_minus([np.exp(one.loss).mean() for one in seeds], ".2f"),
            "mean gap": plus_minus([one.gap.mean() for one in seeds]),
            "worst gap": plus_minus([one.gap.max() for one in seeds]),
            "KL": plus_minus([one.kl.mean() for one in seeds]),
            f"loss − {BASE}, paired": plus_minus(change, "+.4f"),
            "better in": f"{(change < 0).sum()} of {len(change)}",
            "measuring, % of time": f"{100 * np.mean([one.measuring for one in seeds]):.1f}",
        }
        rows.append(row)
    return rows


def by_domain(
    found: Mapping[str, Sequence[Found]],
    domains: Sequence[str],
    figure: Callable[[Found], Floats],
    spec: str,
) -> list[dict[str, Any]]:
    """Return one row per method and one column per domain."""
    return [
        {"method": name}
        | {
            domain: plus_minus([figure(one)[n] for one in seeds], spec)
            for n, domain in enumerate(domains)
        }
        for name, seeds in found.items()
    ]


def side_by_side(
    cached: Sequence[Found], live: Sequence[Found], domains: Sequence[str]
) -> list[dict[str, Any]]:
    """Return final losses of runs from the cache and with the live teacher, by domain."""
    rows = []
    for n, domain in enumerate(domains):
        one, other = ([run.loss[n] for run in runs] for runs in (cached, live))
        change = np.subtract(one, other)
        row = {"domain": domain, "cache": plus_minus(one), "live teacher": plus_minus(other)}
        spread = max(spread_of(one), spread_of(other))
        row |= {"cache − live, paired": plus_minus(change, "+.4f")}
        rows.append(row | {"within the seeds' spread": str(bool(abs(change.mean()) <= spread))})
    return rows


# --- the command ---


def chosen(names: str, intervals: str, alphas: str) -> dict[str, dict[str, Any]]:
    """Return methods by their names, and DDK at other intervals and α. Raises InputError."""
    wanted = [name.strip() for name in names.split(";")] if names else list(METHODS)
    for name in wanted:
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}. Known: {'; '.join(METHODS)}.")
    methods = {name: METHODS[name] for name in wanted}
    for text in filter(None, intervals.split(",")):
        methods[f"DDK, interval {text}"] = {"weighting": "ddk", "interval": int(text)}
    for text in filter(None, alphas.split(",")):
        methods[f"DDK, α = {text}"] = {"weighting": "ddk", "alpha": float(text)}
    return methods


def tell(record: Record, found: Mapping[str, Sequence[Found]], domains: Sequence[str]) -> None:
    """Print and keep all tables."""
    record.table("held-out rows: means over domains", summary(found))
    record.table("held-out loss, nats", by_domain(found, domains, lambda one: one.loss, ".3f"))
    perplexity = by_domain(found, domains, lambda one: np.exp(one.loss), ".1f")
    record.table("held-out perplexity", perplexity)
    record.table("gap, nats", by_domain(found, domains, lambda one: one.gap, ".3f"))
    drawn = by_domain(found, domains, lambda one: 100 * one.weight, ".1f")
    record.table("rows drawn, %", drawn)
    if LIVE in found and "DDK" in found:
        live = side_by_side(found["DDK"], found[LIVE], domains)
        record.table("DDK: cached targets compared with a live teacher", live)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="LRU between calls.")
@click.option("--methods", default="", help="Names with ';' between them; all if not given.")
@click.option("--intervals", default="", help="DDK at these too, for example 10,50,75.")
@click.option("--alphas", default="", help="DDK at these too, for example 0.25,0.75,1.")
@click.option("--layers", help="The student is these of the teacher, as 0,2,5.  [default: fresh]")
@click.option("--live", is_flag=True, help="DDK with the teacher in the loop too.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--steps", default=150, show_default=True)
@click.option("--interval", default=25, show_default=True)
@click.option("--rows", default=8, show_default=True, help=f"Rows of {SEQ_LEN} tokens per step.")
@click.option("--eval-rows", default=24, show_default=True, help="Rows per domain.")
@click.option("--gamma", default=0.2, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--warm-steps", default=300, show_default=True)
@click.option("--warm-lr", default=3e-3, show_default=True)
@click.option("--tokens", default=1_200_000, show_default=True, help="Tokens in the cache.")
@click.option("--holdout", default=0.2, show_default=True)
@click.option("--targets", default="sampled:24", show_default=True)
@json_option
def main(json_path: Path | None, work: Path, **options: Any) -> None:
    """Train under each rule of domain weights; compare held-out losses over seeds."""
    record = Record("domains", options, ["torch", "transformers"])
    methods = chosen(options["methods"], options["intervals"], options["alphas"])
    shared = {name: options[name] for name in ("rows", "eval_rows", "interval", "gamma", "lr")}
    shared |= {"steps": options["steps"], "warmup": options["steps"] // 10, "keep": 1}
    steps = options["warm_steps"]
    warm = {"steps": steps, "interval": steps, "warmup": steps // 10, "lr": options["warm_lr"]}
    work.mkdir(parents=True, exist_ok=True)
    path = work / "mix.zarr"
    make_cache(path, data(), *(options[name] for name in ("tokens", "holdout", "targets")))
    cache = open_cache(path)
    if layers := options["layers"]:
        student, runs = work / f"layers-{layers}", work / f"runs-{layers}"
        if not student.exists():
            cut_student(data() / "teacher", student, layers=parse_layers(layers))
    else:
        student, runs = work / "student.json", work / "runs"
        fresh_config(student, cache.spec.vocab_size)
    bench = Bench(path, student, runs, shared, warm)
    teacher = full_distributions(data() / "teacher") if options["live"] else None
    found: dict[str, list[Found]] = {}
    for seed in range(options["seeds"]):
        found.setdefault("at the start", []).append(outcome(bench.warmed(seed)))
        for name, changes in methods.items():
            found.setdefault(name, []).append(bench.method(name, changes, seed))
        if teacher:
            ddk = {"weighting": "ddk", "micro_rows": 2}
            found.setdefault(LIVE, []).append(bench.method(LIVE, ddk, seed, teacher))
    tell(record, found, sorted(cache.domains))
    record.write(json_path)
