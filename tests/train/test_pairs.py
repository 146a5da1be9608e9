"""Runs on pairs: drawn by the weights, resumed bit by bit, measured on held-out pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddk_cache import InputError, MismatchError, open_pairs
from ddk_train import TrainConfig, train
from ddk_train.data.pairs import PairOrder, PairReader
from tests.helpers import RUN, read_weights, timeless
from tests.runs import open_trainer, page_of
from tests.sequences import Material

Make = Callable[..., TrainConfig]
EVERY = slice(None)


@pytest.fixture
def settings(material: Material, tmp_path: Path) -> Make:
    def settings(run: str = "run", **changes: Any) -> TrainConfig:
        paths = {
            "cache": str(material.cache),
            "run": str(tmp_path / run),
            "student": str(material.folder / "student"),
        }
        pairs = {"pairs": "dpkd", "pair_rows": 8, "micro_rows": 6, "rows": 4, "beta": 0.5}
        return TrainConfig(**paths | RUN | pairs | changes)

    return settings


def test_pairs_are_read_as_they_were_stored(material: Material) -> None:
    pairs = open_pairs(material.cache)
    reader = PairReader(pairs, ["sums", "words"], torch.device("cpu"))
    batch = reader.read("train", np.array([1, 0, 1]), np.array([4, 2, 0]))
    for place, (name, pair) in enumerate((("words", 4), ("sums", 2), ("words", 0))):
        for side in (0, 1):
            row = pairs[name].train[2 * pair + side]
            mask = batch.loss_mask[place, side].numpy()
            assert (mask == row.loss_mask).all()
            assert batch.lengths[place, side] == row.loss_mask.sum()
            assert (batch.tokens[place, side, 1:].numpy()[mask] == row.tokens[1:][mask]).all()
            expected = row.label_logprob[row.loss_mask].sum(dtype=np.float64)
            assert float(batch.logp[place, side]) == pytest.approx(expected, rel=1e-6)
    for piece in batch.micro(2):
        assert piece.loss_mask[..., -1].any()
        assert piece.tokens.shape[-1] == piece.loss_mask.shape[-1] + 1


def test_pairs_are_drawn_by_the_weights_and_every_one_comes(material: Material) -> None:
    pairs = open_pairs(material.cache)
    order = PairOrder(pairs, ["none", "sums", "words"], 8, 0, EVERY)
    assert order.domains == ["sums", "words"]
    counts = np.zeros(3, np.int64)
    seen: set[int] = set()
    for step in range(40):
        if step == 20:
            again = PairOrder(pairs, ["none", "sums", "words"], 8, 0, slice(1, None, 2))
            again.load_state_dict(json.loads(json.dumps(order.state_dict())))
            draw, mine = again.next(np.array([0.5, 0.125, 0.375]))
        whole, _ = order.next(np.array([0.5, 0.125, 0.375]))
        if step == 20:
            assert (draw.row == whole.row).all()
            assert (mine.row == whole.row[1::2]).all()
        counts += order.counts(whole, 3)
        seen |= set(whole.row[whole.domain == 0].tolist())
    assert counts.tolist() == [0, 80, 240]
    assert seen == set(range(pairs.plan("sums").rows("train") // 2))


def test_the_gradient_of_a_step_is_that_of_the_formula(settings: Make) -> None:
    trainer = open_trainer(settings())
    trainer.measure_if_due()
    assert trainer.pairs
    state, weights = trainer.pairs.order.state_dict(), trainer.weights.weights
    learned = trainer.pairs.backward(trainer.model, weights)
    got = {n: p.grad.clone() for n, p in trainer.student.named_parameters()}

    model = trainer.student.double()
    model.zero_grad()
    trainer.pairs.order.load_state_dict(state)
    draw, _ = trainer.pairs.order.next(weights)
    pairs, losses, margins = trainer.pairs.reader.pairs, [], []
    for domain, number in zip(draw.domain, draw.row, strict=True):
        rewards = []
        for side in (0, 1):
            row = pairs[trainer.pairs.order.domains[domain]].train[2 * int(number) + side]
            tokens, mask = torch.from_numpy(row.tokens), torch.from_numpy(row.loss_mask)
            tokens[tokens >= 300] = 0
            logq = model(tokens[None, :-1]).logits[0].log_softmax(-1)
            q = logq.gather(1, tokens[1:, None])[:, 0][mask].sum()
            p = float(row.label_logprob[row.loss_mask].sum(dtype=np.float64))
            rewards.append(0.5 / int(mask.sum()) * (q - p))
        losses.append(-torch.sigmoid(rewards[0] - rewards[1]).log())
        margins.append(float((rewards[0] - rewards[1]).detach()))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert learned.metrics["pair_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert learned.metrics["margin"] == pytest.approx(np.mean(margins), rel=1e-4, abs=1e-6)
    assert learned.metrics["preferred"] == np.mean(np.array(margins) > 0)
    assert sum(learned.rows) == 8
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(got[name].double(), p.grad, rtol=1e-3, atol=1e-6)


def test_the_gradient_of_the_rows_is_added_with_its_weight(settings: Make) -> None:
    def step(name: str, **changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        trainer = open_trainer(settings(name, clip=1e9, gamma=0.4, **changes))
        trainer.measure_if_due()
        kept: dict[str, torch.Tensor] = {}

        def keep(*_: Any) -> None:
            kept.update({n: p.grad.clone() for n, p in trainer.student.named_parameters()})

        with trainer.optimizer.register_step_pre_hook(keep):
            metrics = trainer.step(next(iter(trainer.batches_until_due())))
        return kept, metrics

    rows, of_rows = step("rows", pairs="none")
    pairs, of_pairs = step("pairs", rows_weight=0.0)
    both, of_both = step("both", rows_weight=0.25)
    for name in both:
        torch.testing.assert_close(
            both[name], pairs[name] + 0.25 * rows[name], rtol=1e-4, atol=1e-7
        )
    assert of_both["loss"] == pytest.approx(of_pairs["loss"] + 0.25 * of_rows["loss"], rel=1e-5)


def test_a_student_learns_to_prefer_the_teachers_responses(settings: Make) -> None:
    run = train(settings(steps=40, interval=20, rows_weight=0.0, beta=1.0))
    metrics, history = run.metrics(), run.history()
    first, last = metrics[:10], metrics[-10:]
    assert np.mean([m["margin"] for m in last]) > np.mean([m["margin"] for m in first]) + 0.01
    assert np.mean([m["pair_loss"] for m in last]) < np.mean([m["pair_loss"] for m in first])
    assert "ce" not in metrics[0]
    last = [row for row in history if row["step"] == 40]
    assert {row["rows_seen"] for row in history if not row["step"]} == {0}
    assert sum(row["rows_seen"] for row in last) == 40 * 8
    assert sum(row["tokens_seen"] for row in last) == metrics[-1]["tokens"]


def test_losses_on_unseen_rows_are_those_of_the_rows_alone(settings: Make) -> None:
    def unseen(name: str, **changes: Any) -> dict[str, list[float]]:
        trainer = open_trainer(settings(name, **changes))
        trainer.measure_if_due()
        trainer.step(next(iter(trainer.batches_until_due())))
        return trainer.state.unseen_sums

    assert unseen("both", rows_weight=0.25) == unseen("rows", pairs="none") != {}
    assert unseen("pairs", rows_weight=0.0) == {}


@pytest.mark.parametrize("change", [{}, {"pairs": "plad", "rows_weight": 0.0}])
def test_a_stopped_run_ends_with_the_same_bits(settings: Make, change: dict[str, Any]) -> None:
    whole = train(settings("whole", **change))
    stopped = settings("stopped", **change)
    trainer = open_trainer(stopped)
    with trainer.run.locked():
        trainer.measure_if_due()
        for batch in trainer.batches_until_due():
            trainer.step(batch)
        trainer.save()
        for batch in trainer.batches_until_due():  # steps that are lost
            trainer.step(batch)
    trainer.loader.close()
    resumed = train(stopped)
    assert timeless(resumed.metrics()) == timeless(whole.metrics())
    assert timeless(resumed.history()) == timeless(whole.history())
    one, other = read_weights(resumed.student), read_weights(whole.student)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_held_out_pairs_are_measured_as_they_are(settings: Make, material: Material) -> None:
    trainer = open_trainer(settings(eval_rows=1000))
    assert trainer.pairs
    found = trainer.pairs.measure(trainer.objective)
    pairs, model = open_pairs(material.cache), trainer.student
    margins = []
    for pair in range(len(pairs["sums"].validation) // 2):
        rewards = []
        for side in (0, 1):
            row = pairs["sums"].validation[2 * pair + side]
            mask = torch.from_numpy(row.loss_mask)
            tokens = torch.from_numpy(row.tokens).clamp(max=299)
            with torch.no_grad():
                logq = model(tokens[None, :-1]).logits[0].log_softmax(-1)
            q = logq.gather(1, tokens[1:, None])[:, 0][mask].sum()
            p = row.label_logprob[row.loss_mask].sum()
            rewards.append(0.5 * float(q - p) / int(mask.sum()))
        margins.append(rewards[0] - rewards[1])
    assert found["sums"]["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert found["sums"]["preferred"] == np.mean(np.array(margins) > 0)


def test_a_report_shows_pairs_and_one_without_does_not(settings: Make, tmp_path: Path) -> None:
    run, plain = train(settings(steps=4)), train(settings("plain", steps=4, pairs="none"))
    page = page_of(tmp_path, run.path)
    for heading in ("Preference on held-out pairs", "Margin on held-out pairs", "Implicit rewards"):
        assert heading in page
        assert heading not in page_of(tmp_path, plain.path)
    assert "preferred" not in plain.metrics()[0]
    assert {row["preferred"] for row in plain.history()} == {None}


def test_a_run_does_not_resume_with_other_pairs(settings: Make) -> None:
    run = train(settings(steps=3))
    path = run.path / "config.json"
    config = json.loads(path.read_text())
    config["provenance"]["pairs"]["content"]["sums"] = "beef"
    path.write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=r"  pairs: it has .*beef.*, this call asks for"):
        train(settings(steps=3))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pair_rows": 3}, "pair_rows must be even"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"pairs": "dpdk"}, "Did you mean 'dpkd'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(
    settings: Make, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        settings(**change)


def test_a_cache_without_pairs_is_refused(configure: Make) -> None:
    with pytest.raises(InputError, match="has no pairs of responses"):
        train(configure(pairs="dpkd"))
