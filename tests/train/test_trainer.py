"""A step and a loop: without a teacher, cut anyhow, and clear about a loss that is not finite."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ddk_cache import DDKError
from ddk_cache.read.cache import Cache
from ddk_cache.testing import random_teacher
from ddk_train import train
from ddk_train.trainer import Trainer
from ddk_train.weights.gaps import Gaps, Settings
from ddk_train.weights.rules import RULES, update
from tests.helpers import Configure, command, finish, read_weights
from tests.runs import open_trainer


def test_a_student_learns_and_loads_as_an_ordinary_model(configure: Configure) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(configure(steps=40, interval=20))
    metrics = run.metrics()
    assert [line["step"] for line in metrics] == list(range(1, 41))
    assert metrics[-1]["ce"] < metrics[0]["ce"] - 0.1
    assert metrics[-1]["tokens"] == 40 * 6 * 16
    student = AutoModelForCausalLM.from_pretrained(run.student)
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    ids = tokenizer("abc ", return_tensors="pt").input_ids
    out = student.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
    )
    assert tokenizer.decode(out[0]).startswith("abc ")


def test_the_history_tells_algorithm_1(configure: Configure, cache: Cache) -> None:
    run = train(configure(weighting="ddk"))
    history = run.history()
    assert [row["step"] for row in history] == [step for step in (0, 4, 8, 12) for _ in range(3)]
    at = {step: [row for row in history if row["step"] == step] for step in (0, 4, 8, 12)}
    sizes = np.array([cache.plan(name).rows("train") for name in cache.domains])
    ratios = {
        step: np.exp([row["student_loss"] - row["teacher_loss"] for row in rows])
        for step, rows in at.items()
    }
    eq1 = np.exp(ratios[0] - ratios[0].max())
    factor = eq1 / eq1.sum()
    recorded = {step: np.exp([row["log_factor"] for row in rows]) for step, rows in at.items()}
    np.testing.assert_allclose(recorded[0], factor, rtol=1e-9)
    np.testing.assert_allclose([row["weight"] for row in at[0]], sizes / sizes.sum(), rtol=1e-12)
    for step in (4, 8, 12):
        psi = factor * np.exp(ratios[step])
        factor = 0.5 * psi / psi.sum() + 0.5 / 3
        np.testing.assert_allclose(recorded[step], factor, rtol=1e-9)
        np.testing.assert_allclose([row["weight"] for row in at[step]], factor, rtol=1e-9)
    seen = np.array([[row["rows_seen"] for row in rows] for rows in at.values()])
    assert (seen.sum(1) == np.array([0, 24, 48, 72])).all()
    for before, after in ((0, 4), (4, 8), (8, 12)):
        drawn = seen[after // 4] - seen[before // 4]
        weights = np.array([row["weight"] for row in at[before]])
        assert (np.abs(drawn - 24 * weights) < 2).all()


def recorded(found: Any) -> Gaps:
    """Return a measurement from its rows of the history, without domains that are left out."""
    found = found[found.log_factor.notna()]
    names = {"sizes": "train_rows", "epochs": "epoch"}
    names |= {n: n for n in ("student_loss", "teacher_loss", "rows_seen", "fall_error")}
    arrays = {name: found[column].to_numpy(np.float64) for name, column in names.items()}
    gaps = Gaps(**arrays, decaying=bool(found.decaying.iloc[0]))
    unseen = (found[f"unseen_{who}_loss"].to_numpy(np.float64) for who in ("student", "teacher"))
    return gaps.filled(*unseen)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_recorded_weights_follow_from_recorded_gaps_exactly(
    rule: str, configure: Configure, prophet_cache: Cache
) -> None:
    weights = "digits=1,letters=2,notes=5" if rule == "fixed" else ""
    run = train(
        configure(cache=str(prophet_cache.root), weighting=rule, weights=weights, alpha=0.7)
    )
    columns = pq.read_table(run.path / "history.parquet").to_pandas().groupby("step")
    given = np.array([1.0, 2.0, 5.0]) / 8 if weights else None
    factor = before = None
    past: list[Gaps] = []
    for _, found in columns:
        gaps = recorded(found)
        factor, after = update(rule, gaps, factor, Settings(0.7, given), past)
        past.append(gaps)
        np.testing.assert_array_equal(found.log_factor, factor)
        np.testing.assert_array_equal(found.weight, after)
        if before is None:
            assert found.weight_before.isna().all()
        else:
            np.testing.assert_array_equal(found.weight_before, before)
        before = after
    assert len(columns) == 4


def test_the_history_counts_what_the_metrics_count(configure: Configure) -> None:
    run = train(configure())
    history, metrics = run.history(), {line["step"]: line for line in run.metrics()}
    for step in (4, 8, 12):
        rows = [row for row in history if row["step"] == step]
        assert sum(row["tokens_seen"] for row in rows) == metrics[step]["tokens"]
        assert [row["tokens_seen"] for row in rows] == [row["rows_seen"] * 16 for row in rows]
    seconds = sum(row["eval_seconds"] for row in history if row["step"] < 12)
    share = seconds / (seconds + metrics[12]["seconds"])
    assert metrics[12]["eval_share"] == pytest.approx(share)


def test_measured_gaps_are_those_of_the_written_student(configure: Configure, cache: Cache) -> None:
    from transformers import AutoModelForCausalLM

    run = train(configure(eval_rows=10_000, weighting="uniform"))
    student = AutoModelForCausalLM.from_pretrained(run.student).double()
    for row in run.history()[-3:]:
        name = row["domain"]
        rows = cache.read(name, "validation", cache.row_numbers(name, "validation"))
        tokens, mask = torch.from_numpy(rows.tokens), torch.from_numpy(rows.loss_mask)
        with torch.no_grad():
            q = student(input_ids=tokens[:, :-1]).logits.softmax(-1)
        ce = -q.gather(-1, tokens[:, 1:, None]).log()[..., 0][mask].mean()
        t, ids = torch.from_numpy(rows.targets.probs).double(), torch.from_numpy(rows.targets.ids)
        tail, kept = torch.from_numpy(rows.targets.tail).double(), q.gather(-1, ids)
        rest = tail * (tail / (1 - kept.sum(-1))).log()
        kl = ((t * (t / kept).log()).sum(-1) + rest)[mask].mean()
        assert row["student_loss"] == pytest.approx(float(ce), abs=1e-5)
        assert row["kl"] == pytest.approx(float(kl), abs=1e-5)
        assert row["student_perplexity"] == pytest.approx(math.exp(row["student_loss"]))
        assert row["teacher_perplexity"] == pytest.approx(math.exp(row["teacher_loss"]))


def test_losses_on_unseen_rows_are_those_of_the_step_and_end_with_the_first_epoch(
    configure: Configure, cache: Cache
) -> None:
    trainer = open_trainer(
        configure(weighting="uniform", steps=99, interval=99, checkpoint_every=99, rows=9)
    )
    trainer.measure_if_due()
    sums = np.zeros((3, 3))
    for step, batch in enumerate(trainer.batches_until_due()):
        model = copy.deepcopy(trainer.student).eval()
        for number, row in zip(batch.draw.domain, batch.draw.row, strict=True):
            found = cache.read(trainer.domains[number], "train", [row])
            tokens = torch.from_numpy(found.tokens)
            with torch.no_grad():
                logp = model(input_ids=tokens[:, :-1]).logits.double().log_softmax(-1)
            ce = -logp.gather(-1, tokens[:, 1:, None]).sum()
            sums[number] += float(ce), -found.label_logprob.sum(dtype=np.float64), 16
        trainer.step(batch)
        if step == 2:
            break
    had = trainer.state.unseen_sums
    np.testing.assert_allclose([had[name] for name in trainer.domains], sums, rtol=1e-5)
    for batch in trainer.batches_until_due():
        trainer.step(batch)
        if min(trainer.loader.epochs()) > 2:
            break
    rows = np.array([had[name][2] for name in trainer.domains]) / 16
    whole = np.array([cache.plan(name).rows("train") for name in trainer.domains])
    assert (rows <= whole).all()
    assert (rows > whole - 9).all()


def test_a_held_out_loss_that_rises_is_a_warning(
    configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(configure(steps=20, interval=2, lr=1.0, clip=1e3, forgetting=0.1))
    told = caplog.text.count("above its lowest")
    lowest: dict[str, float] = {}
    risen = 0
    for row in run.history():
        lowest[row["domain"]] = min(row["student_loss"], lowest.get(row["domain"], math.inf))
        risen += row["student_loss"] > lowest[row["domain"]] + 0.1
    assert told == risen > 0


def test_teacher_loss_is_that_of_the_measured_rows(configure: Configure, cache: Cache) -> None:
    run = train(configure(eval_rows=10_000, steps=1))
    for row in run.history()[:3]:
        total, positions = cache.teacher_loss(row["domain"], "validation")
        assert row["teacher_loss"] == pytest.approx(total / positions, abs=cache.logprob.error)


def test_the_loss_does_not_depend_on_how_a_batch_is_cut(configure: Configure) -> None:
    losses = [
        train(configure(f"micro-{size}", micro_rows=size, steps=3)).metrics()[-1]["loss"]
        for size in (1, 2, 6)
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def test_no_teacher_is_needed(
    teacher_dir: Path, corpus: Path, student_config: Path, tmp_path: Path
) -> None:
    teacher, path = tmp_path / "teacher", tmp_path / "mix.zarr"
    shutil.copytree(teacher_dir, teacher)
    words = ["--seq-len", 16, "--targets", "topk:8", "--chunk-rows", 2, "--shard-rows", 8]
    built = finish(
        command("ddk-cache", "build", corpus, path, "--teacher", teacher, "--holdout", 0.3, *words)
    )
    assert built[0] == 0, built[2]
    teacher.rename(tmp_path / "moved")
    moved = corpus.rename(corpus.with_name("moved"))
    try:
        words = ["--steps", 4, "--interval", 2, "--rows", 4]
        ran = finish(
            command("ddk-train", "run", path, tmp_path / "run", "--student", student_config, *words)
        )
    finally:
        moved.rename(corpus)
    assert ran[0] == 0, ran[2]
    assert "letters" in ran[1]
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_a_live_teacher_gives_the_run_of_its_cache(configure: Configure) -> None:
    from ddk_cache import SparseTargets
    from ddk_cache.build import targets
    from ddk_cache.format.spec import TargetSpec

    teacher = random_teacher()

    def live(tokens: torch.Tensor) -> SparseTargets[torch.Tensor]:
        logits = teacher.logits(tokens[:, :-1])
        scores = targets.extract(logits, tokens[:, 1:], TargetSpec("topk", 8))
        return scores.targets("topk")

    cached, alive = train(configure("cached")), train(configure("live"), live=live)
    for one, other in zip(cached.metrics(), alive.metrics(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-3)


def test_a_loss_that_is_not_finite_updates_nothing_and_names_the_rows(
    configure: Configure,
) -> None:
    trainer = open_trainer(configure())
    trainer.measure_if_due()
    batch = next(iter(trainer.batches_until_due()))
    before = {name: p.clone() for name, p in trainer.student.named_parameters()}
    batch.targets.probs[1, 2, 3] = math.nan
    with pytest.raises(DDKError, match=r"not finite at step 1 \(domain '.*rows \[.*no checkpoint"):
        trainer.step(batch)
    assert all(torch.equal(p, before[name]) for name, p in trainer.student.named_parameters())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tol: float = 2e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=tol)


def gradient(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the gradient of the first step."""
    trainer.measure_if_due()
    batch = next(iter(trainer.batches_until_due()))
    trainer.backward(batch, int(batch.loss_mask.sum()))
    return {n: p.grad for n, p in trainer.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [3, 2, 4, 1])  # 2, 3, 2 (ragged) and 6 pieces
def test_accumulation_gives_the_same_gradient(configure: Configure, rows: int) -> None:
    whole = gradient(open_trainer(configure("whole", micro_rows=0)))
    cut = gradient(open_trainer(configure("cut", micro_rows=rows)))
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-7)


def test_accumulation_gives_the_same_student(configure: Configure) -> None:
    students = [
        read_weights(train(configure(f"run{size}", rows=8, micro_rows=size, steps=3)).student)
        for size in (8, 4, 2)
    ]
    # Adam's first steps follow the sign of a gradient, however small; hence the tolerance.
    same(students[0], students[1], 1e-4)
    same(students[0], students[2], 1e-4)


def test_gradient_checkpointing_changes_nothing(configure: Configure) -> None:
    plain = gradient(open_trainer(configure("plain")))
    again = gradient(open_trainer(configure("again", gradient_checkpointing=True)))
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


@pytest.mark.slow
def test_a_compiled_student_is_the_same(configure: Configure) -> None:
    plain = gradient(open_trainer(configure("plain")))
    compiled = gradient(open_trainer(configure("compiled", compile=True)))
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd:0.5", "skew_kl:0.1", "dpkd:0.5"])
def test_other_divergences_train(configure: Configure, loss: str) -> None:
    metrics = train(configure(loss=loss, gamma=1.0, steps=30, interval=30)).metrics()
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_a_run_that_gets_no_better_ends_with_its_best_student(configure: Configure) -> None:
    config = configure(
        steps=40, interval=2, checkpoint_every=2, patience=2, keep=1, lr=0.1, clip=1e3,
        warmup=0, micro_rows=0,
    )  # fmt: skip
    run = train(config)
    losses: dict[int, list[float]] = {}
    for row in run.history():
        losses.setdefault(row["step"], []).append(row["student_loss"])
    means = {step: np.mean(values) for step, values in losses.items()}
    best = min(means, key=lambda step: means[step])
    assert 0 < best < 40
    assert max(means) == best + 4
    steps = [step for step, _ in run.checkpoints()]
    assert steps == sorted({best, best + 4})
    same(read_weights(run.student), read_weights(run.checkpoints()[0][1] / "student"), 0.0)
    again = train(config)
    assert again.metrics() == run.metrics()
