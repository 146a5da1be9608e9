"""Where a student's tokens are best spent: the rules of domain weights, side by side.

A student is warmed by plain training, once for each seed; from there every method has the same
budget, the same cache and the same held-out rows, so that all comparisons over seeds are paired.
Each run is an ordinary run of `train` in `--work`, which `ddk-train report` can show. Results are
kept in the `--json` file as they come: what is there is not run again, so a stopped call resumes,
and a later one may add seeds or methods.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benches.common import Floats, Record, data, json_option
from benches.mixes import MIXES, write_mix
from benches.outcomes import LIVE, MORE, Found, Results, outcome, tell
from benches.responses import best_shares, raised
from benches.shared import SEQ_LEN, STUDENT
from ddk_cache import InputError, MismatchError, SparseTargets, load_teacher, open_cache
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.console import say
from ddk_cache.hf import load_tokenizer
from ddk_train import TrainConfig, cut_student, train
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
    "DDK, α = 0.25": {"weighting": "ddk", "alpha": 0.25},
    "excess": {"weighting": "excess"},
    "excess, α = 1": {"weighting": "excess", "alpha": 1.0},
    "gain": {"weighting": "gain"},
    "gain, shrunk": {"weighting": "gain", "shrink": True},
    "gain, τ = 1": {"weighting": "gain", "tilt": 1.0},
    "gain, guarded": {"weighting": "gain", "repetition_guard": True},
    "progress": {"weighting": "gain", "rho": 1.0, "alpha": 0.5},
}
"""What differs from the settings of all; γ elsewhere is `--gamma`, α the default of the rule."""

EVEN, LONGER, ORACLE = "KD uniform", "KD uniform, equal time", "oracle"
"""Even weights; the same without measurements, for as long as rules with them take; and the best
shares by the responses of this very run (`benches.responses`)."""

HELD_OUT_COST = 0.38
"""Cost of measuring a held-out row, in training rows (docs/measurements/domains.md)."""


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

    def start(self, seed: int) -> Found:
        """Return where every method of a seed starts."""
        return outcome(self.warmed(seed))

    def rows_per_second(self) -> float:
        """Return the speed of training on this machine, from a few steps."""
        steps = {"steps": 6, "interval": 6, "eval_rows": 1, "warmup": 0, "log_every": 1}
        with tempfile.TemporaryDirectory() as place:
            paths = {"cache": str(self.cache), "run": f"{place}/run", "student": str(self.student)}
            run = train(TrainConfig(**paths | self.settings | steps))
            seconds = [float(line["seconds"]) for line in run.metrics()]
        rows: float = 5.0 * self.settings["rows"]
        speed: float = rows / (seconds[-1] - seconds[0])
        return speed

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


# --- what is trained on ---


def make_cache(path: Path, place: Path, mix: str, settings: Mapping[str, Any]) -> None:
    """Build a cache of so many tokens of a mix of the corpus."""
    build_cache(
        path,
        write_mix(path.parent, place / "corpus", mix, settings["tokens"]),
        load_teacher(str(place / "teacher")),
        load_tokenizer(str(place / "teacher")),
        BuildConfig(seq_len=SEQ_LEN, targets=settings["targets"], holdout=settings["holdout"]),
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


# --- the command ---


def chosen(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return methods by their names, and DDK at other intervals and α. Raises InputError."""
    names = options["methods"]
    wanted = [name.strip() for name in names.split(";")] if names else [*METHODS, LONGER]
    for name in wanted:
        if name not in (*METHODS, LONGER):
            raise InputError(f"unknown method {name!r}. Known: {'; '.join((*METHODS, LONGER))}.")
    longest = {"steps": longer(options), "interval": longer(options), "weighting": "uniform"}
    methods = {name: METHODS.get(name, longest) for name in wanted}
    for text in filter(None, options["intervals"].split(",")):
        methods[f"DDK, interval {text}"] = {"weighting": "ddk", "interval": int(text)}
    for text in filter(None, options["alphas"].split(",")):
        methods[f"DDK, α = {text}"] = {"weighting": "ddk", "alpha": float(text)}
    return methods


def measured_rows(options: Mapping[str, Any]) -> float:
    """Return what the measurements of a run cost, in training rows."""
    measurements = 1 + math.ceil(options["steps"] / options["interval"])
    rows: int = measurements * options["domains"] * options["eval_rows"]
    return HELD_OUT_COST * rows


def longer(options: Mapping[str, Any]) -> int:
    """Return the steps of a run without measurements that takes as long as one with them."""
    return int(options["steps"] + round(measured_rows(options) / options["rows"]))


def announce(options: Mapping[str, Any], methods: int, rows_per_second: float) -> None:
    """Say what the measurement will cost."""
    each = options["steps"] * options["rows"] + measured_rows(options)
    oracles = (options["domains"] + 1) * options["oracle"]
    rows = options["seeds"] * (methods * each + options["warm_steps"] * options["rows"])
    rows += oracles * options["steps"] * options["rows"]
    say(
        f"{options['seeds']} seeds × {methods} runs, {oracles} of the oracle: {rows:,.0f} training "
        f"rows of {SEQ_LEN} tokens or their cost, {rows / rows_per_second / 3600:.2f} hours at "
        f"{rows_per_second:.1f} rows/s"
    )


def oracle(bench: Bench, results: Results, seed: int, domains: Sequence[str]) -> None:
    """Train under the best shares by the responses of the same seed."""

    def under(name: str, shares: Floats) -> Found:
        weights = ",".join(f"{d}={s:.6f}" for d, s in zip(domains, shares, strict=True))
        interval = bench.settings["steps"]
        changes = {"weighting": "fixed", "weights": weights, "interval": interval}
        return results.get(seed, name, lambda: bench.method(name, changes, seed))

    even = results.get(seed, EVEN, lambda: bench.method(EVEN, METHODS[EVEN], seed))
    ups = [under(f"{MORE} {d}", raised(len(domains), n)) for n, d in enumerate(domains)]
    under(ORACLE, best_shares(even.loss, [one.loss for one in ups]))


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Kept between calls.")
@click.option(
    "--mix",
    type=click.Choice(MIXES),
    default="plain",
    show_default=True,
    help="The corpus as it is, or with domains that saturate early, with small domains "
    "that are repeated, or with one that cannot be learned.",
)
@click.option("--methods", default="", help="Names with ';' between them; all if not given.")
@click.option("--base", default=EVEN, show_default=True, help="Method that others are paired with.")
@click.option("--oracle", default=0, show_default=True,
              help="Seeds that also show the best static shares, by D + 1 more runs.")  # fmt: skip
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
@click.option("--precision", default="auto", show_default=True, help="bf16 or fp32 of training.")
@click.option("--cost", is_flag=True, help="Print the cost and end.")
@json_option
def main(json_path: Path | None, work: Path, cost: bool, **options: Any) -> None:
    """Train under each rule of domain weights; compare held-out losses over seeds."""
    record = Record("domains", options, ["torch", "transformers"])
    results = Results(record, json_path)
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{options['mix']}.zarr"
    make_cache(path, data(), options["mix"], options)
    cache = open_cache(path)
    bench = prepared(work, path, options)
    domains = sorted(cache.domains)
    sized = {**options, "domains": len(domains)}
    methods = chosen(sized)
    announce(sized, len(methods) + options["live"], bench.rows_per_second())
    if cost:
        return
    teacher = full_distributions(data() / "teacher") if options["live"] else None
    for seed in range(options["seeds"]):
        runs: dict[str, Callable[[], Found]] = {"at the start": partial(bench.start, seed)}
        runs |= {name: partial(bench.method, name, methods[name], seed) for name in methods}
        if teacher:
            ddk = {"weighting": "ddk", "micro_rows": 2}
            runs[LIVE] = partial(bench.method, LIVE, ddk, seed, teacher)
        for name, run in runs.items():
            results.get(seed, name, run)
        if seed < options["oracle"]:
            oracle(bench, results, seed, domains)
    tell(record, results.found(), domains, options["base"])
    record.write(json_path)


def prepared(work: Path, cache: Path, options: Mapping[str, Any]) -> Bench:
    """Make the student that every seed begins with, and return the bench."""
    same = ("rows", "eval_rows", "interval", "gamma", "lr", "precision")
    shared = {name: options[name] for name in same}
    shared |= {"steps": options["steps"], "warmup": options["steps"] // 10, "keep": 1}
    steps = options["warm_steps"]
    warm = {"steps": steps, "interval": steps, "warmup": steps // 10, "lr": options["warm_lr"]}
    if layers := options["layers"]:
        student = work / f"layers-{layers}"
        if not student.exists():
            cut_student(data() / "teacher", student, layers=parse_layers(layers))
    else:
        student = work / "student.json"
        fresh_config(student, open_cache(cache).spec.vocab_size)
    return Bench(cache, student, work / f"runs-{options['mix']}-{layers or 'fresh'}", shared, warm)
