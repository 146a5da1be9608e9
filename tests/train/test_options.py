"""What a run can be told: how to cut a step, schedules, memory, adapters, trackers, its end."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddk_cache import InputError, MismatchError
from ddk_train import TrainConfig
from ddk_train.optim import learning_rate
from ddk_train.trainer import Trainer, train
from tests.helpers import Configure, tree


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a saved student."""
    return load_file(path / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tol: float = 2e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=tol)


def gradient(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the gradient of the first step."""
    trainer.measure()
    batch = next(iter(trainer.until_boundary()))
    trainer.backward(batch, int(batch.loss_mask.sum()))
    return {n: p.grad for n, p in trainer.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [3, 2, 4, 1])  # 2, 3, 2 (ragged) and 6 pieces
def test_accumulation_gives_the_same_gradient(configure: Configure, rows: int) -> None:
    whole = gradient(Trainer(configure("whole", micro_rows=0), None))
    cut = gradient(Trainer(configure("cut", micro_rows=rows), None))
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-7)


def test_accumulation_gives_the_same_student(configure: Configure) -> None:
    students = [
        weights(train(configure(f"run{size}", rows=8, micro_rows=size, steps=3)).student)
        for size in (8, 4, 2)
    ]
    # Adam's first steps follow the sign of a gradient, however small; hence the tolerance.
    same(students[0], students[1], 1e-4)
    same(students[0], students[2], 1e-4)


def test_gradient_checkpointing_changes_nothing(configure: Configure) -> None:
    plain = gradient(Trainer(configure("plain"), None))
    again = gradient(Trainer(configure("again", gradient_checkpointing=True), None))
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


@pytest.mark.slow
def test_a_compiled_student_is_the_same(configure: Configure) -> None:
    plain = gradient(Trainer(configure("plain"), None))
    compiled = gradient(Trainer(configure("compiled", compile=True), None))
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd:0.5", "skew_kl:0.1"])
def test_other_divergences_train(configure: Configure, loss: str) -> None:
    metrics = train(configure(loss=loss, gamma=1.0, steps=30, interval=30)).metrics()
    assert metrics[-1]["loss"] < metrics[0]["loss"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": "kl"}, "unknown loss 'kl'"),
        ({"loss": "jsd:2"}, "takes a number between 0 and 1"),
        ({"temperature": 2.0}, "cannot be read at temperature 2: the mass outside"),
        ({"report_to": "tensorbord"}, "Did you mean 'tensorboard'"),
        ({"lora_rank": 2}, "is for a trained student"),
        ({"weighting": "fixed", "weights": "note=1"}, "Did you mean 'notes'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    configure: Configure, change: dict[str, Any], said: str
) -> None:
    config = configure(**change)
    with pytest.raises((InputError, MismatchError), match=said):
        train(config)
    assert not Path(config.run).exists()


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"
)
def test_8_bits_are_refused_where_the_library_is_missing(configure: Configure) -> None:
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        train(configure(optimizer="adamw_8bit"))


def test_a_tracker_gets_the_metrics(configure: Configure) -> None:
    pytest.importorskip("tensorboard")
    run = train(configure(report_to="tensorboard", steps=2))
    assert list(run.path.rglob("events.out.tfevents.*"))
    assert len(run.metrics()) == 2


def test_wsd_stays_and_falls_in_a_line() -> None:
    config = TrainConfig(
        cache="c", run="r", student="s", steps=100, warmup=10, lr=1.0, min_lr=0.1,
        schedule="wsd", decay=0.5,
    )  # fmt: skip
    rates = [learning_rate(config, step) for step in range(101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:56], 1.0)
    np.testing.assert_allclose(np.diff(rates[55:]), -0.9 / 45, rtol=1e-9)
    assert rates[100] == pytest.approx(0.1)


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
    same(weights(run.student), weights(run.checkpoints()[0][1] / "student"), 0.0)
    again = train(config)
    assert again.metrics() == run.metrics()


@pytest.fixture
def trained(configure: Configure) -> str:
    return str(train(configure("trained", steps=10)).student)


def test_an_adapter_is_trained_and_merged(configure: Configure, trained: str) -> None:
    pytest.importorskip("peft")
    whole = train(configure("lora", student=trained, lora_rank=2))
    before, after = weights(Path(trained)), weights(whole.student)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}


def test_a_resumed_adapter_is_bit_for_bit_the_uninterrupted_one(
    configure: Configure, trained: str
) -> None:
    pytest.importorskip("peft")
    whole = train(configure("lora", student=trained, lora_rank=2, keep_adapter=True))
    first = tree(whole.checkpoints()[-1][1])
    for _, path in whole.checkpoints()[2:]:
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir()
    again = train(configure("lora", student=trained, lora_rank=2, keep_adapter=True))
    second = tree(again.checkpoints()[-1][1])
    for text in (first, second):
        state = json.loads(text.pop("state.json"))
        text["state"] = json.dumps(state | {"seconds": 0, "eval_seconds": 0}).encode()
    assert first == second
    assert (again.student / "adapter_model.safetensors").exists()
