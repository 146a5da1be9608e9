"""What a student learns from responses: fine-tuning, soft targets, and pairs with its own.

The teacher answers word problems of `DDK_DATA` and short questions made here. A student cut from it
is warmed on the responses; from there every method takes as many steps from the same cache, with
several orders of the data. Methods with pairs see `--pair-rows` more rows per step, so they cost
more. What is finished in `--work` is not made again.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import torch

from benches.common import Record, data, json_option, plus_minus
from ddk_cache import InputError, find_sources, load_teacher, load_tokenizer, open_cache, open_pairs
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.console import say
from ddk_cache.corpus.rows import split_of
from ddk_cache.sequences.config import SamplingConfig
from ddk_cache.sequences.decode import load_responder, respond
from ddk_cache.sequences.generate import generate
from ddk_cache.sequences.pair import answer_prompts, build_pairs
from ddk_cache.sequences.prompts import Prompt, read_answered
from ddk_cache.types import VALIDATION
from ddk_train import TrainConfig, cut_student, train
from ddk_train.data.pairs import PairReader
from ddk_train.loss.fused import Terms
from ddk_train.loss.objective import Objective
from ddk_train.loss.preference import PairTerms
from ddk_train.loss.sequence import row_sums
from ddk_train.report.run_report import load
from ddk_train.run.directory import Run

METHODS: dict[str, dict[str, Any]] = {
    "SFT on the teacher's text": {"gamma": 0.0},
    "the same with soft targets": {"gamma": 1.0},
    "DPKD and rows": {"gamma": 0.0, "pairs": "dpkd"},
    "DPKD alone": {"gamma": 0.0, "pairs": "dpkd", "rows_weight": 0.0},
    "DPKD and rows, not per token": {"gamma": 0.0, "pairs": "dpkd", "per_token": False},
    "PLaD's form and rows": {"gamma": 0.0, "pairs": "plad"},
}
"""What differs from the settings of all."""

ASKED = (
    "Explain in two sentences what {} is.",
    "Name three facts about {}.",
    "Write a short riddle whose answer is {}.",
    "What would a child ask about {}?",
    "Give one reason why {} matters to people.",
)
TOPICS = (
    *("rain", "salt", "a bridge", "the moon", "bread", "a clock", "glass", "a river", "music"),
    *("a library", "wool", "a volcano", "honey", "the heart", "a map", "paper", "steel", "a seed"),
    *("the wind", "a mirror", "chess", "a lighthouse", "sleep", "rice", "a violin", "gold", "ice"),
    *("a compass", "soap", "the desert", "a kite", "trade", "a market", "sugar", "a candle"),
    *("the alphabet", "a whale", "a bicycle", "silk", "fire", "money", "a garden", "cotton"),
)


@dataclass(frozen=True)
class Bench:
    """Where everything is, and what is the same in all runs."""

    work: Path
    teacher: Path
    tokenizer: Any
    options: Mapping[str, Any]

    @property
    def cache(self) -> Path:
        """Return the path of the cache of responses."""
        return self.work / "mix.zarr"

    def make(self) -> Path:
        """Make responses, their cache, the warmed student and its pairs; return the student."""
        options, said = self.options, self.work / "said"
        write_prompts(self.work / "prompts", options["prompts"])
        sampling = {"max_new_tokens": options["max_new_tokens"], "batch": options["batch"]}
        config = SamplingConfig(temperature=options["temperature"], **sampling)
        generate(self.work / "prompts", said, load_responder(self.teacher, self.tokenizer), config)
        settings = BuildConfig(
            seq_len=options["seq_len"], targets="topk:32", holdout=options["holdout"], batch_rows=8
        )
        build_cache(self.cache, said, load_teacher(self.teacher), self.tokenizer, settings)
        cut = self.work / "cut"
        if not cut.exists():
            cut_student(self.teacher, cut, keep=options["layers"])
        steps, rate = options["warm_steps"], options["warm_lr"]
        warm = self.run(
            "warm", cut, 0, {"gamma": 0.0, "steps": steps, "interval": steps, "lr": rate}
        )
        with open_cache(self.cache) as cache:
            sources, answers = find_sources(said), self.work / "answers"
            student = load_responder(warm.student, self.tokenizer)
            answer_prompts(cache, sources, student, answers, config)
            teacher = load_teacher(self.teacher)
            build_pairs(cache, sources, answers, teacher, self.tokenizer, batch_rows=8)
        return warm.student

    def run(self, name: str, student: Path, seed: int, changes: Mapping[str, Any]) -> Run:
        """Train, or find what an earlier call trained; only the finished student is kept."""
        run, options = Run(self.work / "runs" / name), self.options
        if run.student.exists():
            return run
        say(f"\n{name}")
        steps = options["steps"]
        settings: dict[str, Any] = {
            "cache": str(self.cache), "run": str(run.path), "student": str(student), "seed": seed,
            "weighting": "uniform", "steps": steps, "interval": steps, "warmup": 5, "keep": 1,
            "eval_rows": 10_000,
        }  # fmt: skip
        same = ("rows", "pair_rows", "beta", "margin", "lr", "precision")
        settings |= {name: options[name] for name in same}
        train(TrainConfig(**settings | {"micro_rows": options["rows"]} | dict(changes)))
        shutil.rmtree(run.path / "checkpoints")
        return run

    def figures(self, student: Path, run: Run, start: bool = False) -> dict[str, float]:
        """Return the held-out figures of a student; `start` takes the run's first measurement."""
        domains = load([run.path])[0].domains
        losses = [one.first_loss if start else one.last_loss for one in domains]
        return {
            "log-likelihood": -statistics.fmean(loss for loss in losses if loss is not None),
            "ROUGE-L": self.rouge(student),
            **self.preference(student),
        }

    def rouge(self, student: Path) -> float:
        """Return ROUGE-L (F) of greedy responses against the teacher's, over held-out prompts."""
        from rouge_score.rouge_scorer import RougeScorer

        config = SamplingConfig(
            temperature=0.0, max_new_tokens=self.options["max_new_tokens"], batch=16
        )
        responder, scorer = load_responder(student, self.tokenizer), RougeScorer(["rougeL"])
        asked = sorted(self.held_out(), key=lambda one: len(one.encode(self.tokenizer)))
        scores = []
        for first in range(0, len(asked), config.batch):
            some = asked[first : first + config.batch]
            ids = [one.encode(self.tokenizer) for one in some]
            said = respond(responder, ids, [0] * len(ids), config)
            for one, response in zip(some, said, strict=True):
                text = self.tokenizer.decode(response.ids, skip_special_tokens=True)
                scores.append(scorer.score(one.response, text)["rougeL"].fmeasure)
        return statistics.fmean(scores)

    def held_out(self) -> list[Prompt]:
        """Return the held-out prompts with the teacher's responses."""
        return [
            prompt
            for source in find_sources(self.work / "said")
            for prompt in read_answered(source)
            if split_of(prompt.content, self.options["holdout"]) == VALIDATION
        ]

    @torch.no_grad()
    def preference(self, student: Path) -> dict[str, float]:
        """Return shares of held-out pairs and the margin, by DPKD's implicit reward per token.

        Every method is judged alike, also those without pairs: `preferred` is the share of pairs
        with a margin above 0, `likelier` that in which the student gives the teacher's response the
        larger likelihood per token.
        """
        pairs = open_pairs(self.cache)
        model = load_responder(student, self.tokenizer).model
        objective = Objective(model, Terms(0.0), pairs.spec.vocab_size, bf16=False)
        reader = PairReader(pairs, pairs.domains, torch.device("cpu"))
        terms, margins = PairTerms("dpkd", beta=self.options["beta"]), []
        likelier: list[bool] = []
        for domain, name in enumerate(pairs.domains):
            numbers = np.arange(pairs.plan(name).rows(VALIDATION) // 2)
            if not len(numbers):
                continue
            whole = reader.read(VALIDATION, np.full(len(numbers), domain), numbers)
            for piece in whole.micro(8):
                tokens, mask = piece.tokens.flatten(0, 1), piece.loss_mask.flatten(0, 1)
                logq = row_sums(objective(tokens, mask, None, apart=True), mask)
                logq = logq.unflatten(0, (-1, 2))
                _, reward = terms(logq, piece.logp, piece.lengths)
                margins += (reward[:, 0] - reward[:, 1]).tolist()
                mean = logq / piece.lengths
                likelier += (mean[:, 0] > mean[:, 1]).tolist()
        return {
            "likelier": statistics.fmean(likelier),
            "preferred": statistics.fmean(margin > 0 for margin in margins),
            "margin": statistics.fmean(margins),
        }


def write_prompts(folder: Path, count: int) -> None:
    """Write the prompts of two domains: word problems of the corpus, and short questions."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = pq.read_table(data() / "corpus" / "math_word.parquet")["text"].to_pylist()
    problems = [text.partition("\nAnswer:")[0].removeprefix("Question: ") for text in texts]
    questions = [asked.format(topic) for topic, asked in product(TOPICS, ASKED)]
    for name, prompts in (("problems", problems), ("questions", questions)):
        lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts[:count])
        (folder / f"{name}.jsonl").write_text("".join(lines))


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Kept between calls.")
@click.option("--teacher", type=click.Path(path_type=Path),
              help="A model with a chat template.  [default: DDK_REAL_TEACHER]")  # fmt: skip
@click.option("--layers", default=10, show_default=True, help="Layers of the student.")
@click.option("--prompts", default=120, show_default=True, help="Prompts per domain.")
@click.option("--max-new-tokens", default=48, show_default=True)
@click.option("--temperature", default=0.7, show_default=True)
@click.option("--batch", default=32, show_default=True, help="Responses written together.")
@click.option("--seq-len", default=128, show_default=True)
@click.option("--holdout", default=0.2, show_default=True)
@click.option("--seeds", default=2, show_default=True, help="Orders of the data.")
@click.option("--steps", default=24, show_default=True)
@click.option("--rows", default=8, show_default=True, help="Rows per step.")
@click.option("--pair-rows", default=8, show_default=True, help="Rows of pairs per step.")
@click.option("--lr", default=1e-4, show_default=True)
@click.option("--warm-steps", default=60, show_default=True)
@click.option("--warm-lr", default=5e-4, show_default=True)
@click.option("--beta", default=0.1, show_default=True)
@click.option("--margin", default=1.0, show_default=True)
@click.option("--precision", default="auto", show_default=True, help="bf16 or fp32 of training.")
@json_option
def main(json_path: Path | None, work: Path, teacher: Path | None, **options: Any) -> None:
    """Train a student on the teacher's responses in six ways; compare it on held-out prompts."""
    place = teacher or os.environ.get("DDK_REAL_TEACHER")
    if not place:
        raise InputError("give --teacher, or set DDK_REAL_TEACHER to a model directory.")
    record = Record("sequences", options, ["torch", "transformers", "rouge-score"])
    bench = Bench(work, Path(place), load_tokenizer(place), options)
    student = bench.make()
    found: dict[str, list[dict[str, float]]] = {}
    for seed, (name, changes) in product(range(options["seeds"]), METHODS.items()):
        folder = "".join(c if c.isalnum() else "-" for c in name)
        run = bench.run(f"{folder}-{seed}", student, seed, changes)
        if not found:
            found["at the start"] = [bench.figures(student, run, start=True)]
        found.setdefault(name, []).append(bench.figures(run.student, run))
    rows = [
        {"method": name}
        | {figure: plus_minus([one[figure] for one in seeds], ".4f") for figure in seeds[0]}
        for name, seeds in found.items()
    ]
    record.table("held-out prompts: mean ± standard deviation over seeds", rows)
    record.write(json_path)
