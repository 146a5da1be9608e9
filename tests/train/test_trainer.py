"""A run: without a teacher, exactly resumable, honest about what went wrong."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ddk_cache import DDKError, InputError, MismatchError
from ddk_cache.read.cache import Cache
from ddk_cache.testing import byte_tokenizer
from ddk_train import TrainConfig
from ddk_train.optim import learning_rate
from ddk_train.run import open_run
from ddk_train.trainer import Trainer, train
from ddk_train.weights import RULES, Gaps, Settings, update
from tests.helpers import Configure, command, finish, timeless, tree


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
    run = train(configure())
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


@pytest.mark.parametrize("rule", sorted(RULES))
def test_recorded_weights_follow_from_recorded_gaps_exactly(
    rule: str, configure: Configure
) -> None:
    weights = "digits=1,letters=2,notes=5" if rule == "fixed" else ""
    run = train(configure(weighting=rule, weights=weights, alpha=0.7))
    columns = pq.read_table(run.path / "history.parquet").to_pandas().groupby("step")
    given = np.array([1.0, 2.0, 5.0]) / 8 if weights else None
    factor = before = None
    for _, found in columns:
        sizes = found.train_rows.to_numpy(np.float64)
        gaps = Gaps(found.student_loss.to_numpy(), found.teacher_loss.to_numpy(), sizes)
        factor, after = update(rule, gaps, factor, Settings(0.7, given))
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


def test_a_domain_that_is_forgotten_is_told(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(configure(steps=20, interval=2, lr=1.0, clip=1e3, forgetting=0.1))
    told = capsys.readouterr().err.count("the student forgets")
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


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    configure: Configure, tmp_path: Path
) -> None:
    whole = train(configure("whole"))
    for step, checkpoint in whole.checkpoints()[:-1]:
        path = tmp_path / f"from-{step}"
        (path / "checkpoints").mkdir(parents=True)
        for name in ("config.json", "history.parquet", "metrics.jsonl"):
            shutil.copy(whole.path / name, path / name)
        shutil.copytree(checkpoint, path / "checkpoints" / checkpoint.name)
        with (path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "lo')  # a line torn by a kill
        resumed = train(configure(path.name))
        assert timeless(resumed.metrics()) == timeless(whole.metrics())
        assert timeless(resumed.history()) == timeless(whole.history())
        assert tree(resumed.student) == tree(whole.student)
        last, again = whole.checkpoints()[-1][1], resumed.checkpoints()[-1][1]
        assert (last / "torch.pt").read_bytes() == (again / "torch.pt").read_bytes()


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
    from ddk_cache.testing import random_teacher

    teacher = random_teacher()

    def live(tokens: torch.Tensor) -> SparseTargets[torch.Tensor]:
        logits = teacher.logits(tokens[:, :-1])
        scores = targets.extract(logits, tokens[:, 1:], TargetSpec("topk", 8))
        return scores.targets("topk")

    cached, alive = train(configure("cached")), train(configure("live"), live=live)
    for one, other in zip(cached.metrics(), alive.metrics(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-3)


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
    assert "Run the same command again to go on." in err
    assert "Traceback" not in err
    ((step, _),) = open_run(tmp_path / "run").checkpoints()
    assert f"stopped after step {step} of 100000" in err


def test_a_loss_that_is_not_finite_updates_nothing_and_names_the_rows(
    configure: Configure,
) -> None:
    trainer = Trainer(configure(), None)
    trainer.measure()
    batch = next(iter(trainer.until_boundary()))
    before = {name: p.clone() for name, p in trainer.student.named_parameters()}
    batch.targets.probs[1, 2, 3] = math.nan
    with pytest.raises(DDKError, match=r"not finite at step 1 \(domain '.*rows \[.*no checkpoint"):
        trainer.step(batch)
    assert all(torch.equal(p, before[name]) for name, p in trainer.student.named_parameters())


def test_a_run_directory_is_not_mixed_up(configure: Configure, tmp_path: Path) -> None:
    train(configure(steps=2))
    with pytest.raises(MismatchError, match="  seed: it has 0, this call asks for 1"):
        train(configure(steps=2, seed=1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is no run directory"):
        train(configure("other"))


def test_a_student_over_another_tokenizer_is_refused(
    configure: Configure, teacher_dir: Path, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(teacher_dir, student)
    assert train(configure("same", student=str(student), steps=1))
    other = byte_tokenizer()
    other.add_tokens(["novel"])
    other.save_pretrained(student)
    with pytest.raises(MismatchError, match="another tokenizer"):
        train(configure("other", student=str(student), steps=1))


def test_a_student_with_too_few_outputs_is_refused(
    configure: Configure, student_config: Path, tmp_path: Path
) -> None:
    config = json.loads(student_config.read_text()) | {"vocab_size": 256}
    (tmp_path / "small.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="outputs for 256 tokens; the cache's tokenizer has 257"):
        train(configure(student=str(tmp_path / "small.json")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weighting": "dkd"}, "Did you mean 'ddk'"),
        ({"precision": "fp16"}, "unknown precision"),
        ({"steps": 0}, "steps has to be at least 1"),
        ({"lr": math.nan}, "lr has to be above 0"),
        ({"alpha": 1.5}, "alpha has to be between 0 and 1"),
        ({"gamma": -1}, "gamma has to be 0 or more"),
        ({"weighting": "fixed"}, "belong together"),
        ({"weights": "code=1"}, "belong together"),
        ({"weighting": "fixed", "weights": "code"}, "cannot read the weight 'code'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        TrainConfig(cache="c", run="r", student="s", **change)


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    config = TrainConfig(cache="c", run="r", student="s", steps=100, warmup=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
