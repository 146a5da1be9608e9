"""Gaps on held-out rows, against every term written out in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_cache import SPLITS
from ddk_cache.read.cache import Cache
from ddk_cache.testing import student_config
from ddk_train import DomainWeights, measure_gaps
from ddk_train.evaluate import GapMeter, fall_error, gap_meter, measure_with, sample
from ddk_train.loss.fused import Terms
from ddk_train.loss.objective import Objective


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**student_config())
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def plainly(model: Any, cache: Cache, name: str, numbers: Any) -> tuple[float, float, float]:
    """Return student loss, teacher loss and KL from the NumPy decoder and the model's logits."""
    rows = cache.read(name, "validation", numbers)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(rows.tokens[:, :-1])).logits.double()
    logq = logits.log_softmax(-1)
    labels, ids = torch.from_numpy(rows.tokens[:, 1:, None]), torch.from_numpy(rows.targets.ids)
    kept, probs = logq.gather(-1, ids), torch.from_numpy(rows.targets.probs).double()
    rest = logq.scatter(-1, ids, -torch.inf).logsumexp(-1)
    tail = torch.from_numpy(rows.targets.tail).double()
    kl = (torch.xlogy(probs, probs) - probs * kept).sum(-1) + torch.xlogy(tail, tail) - tail * rest
    mask = torch.from_numpy(rows.loss_mask)
    loss = -logq.gather(-1, labels)[..., 0]
    teacher = -rows.label_logprob[rows.loss_mask].astype(np.float64)
    return float(loss[mask].mean()), float(teacher.mean()), float(kl[mask].mean())


def test_the_gaps_are_those_of_the_decoded_rows(model: Any, cache: Cache) -> None:
    found = measure_gaps(model.train(), cache.root, rows=5, batch_rows=2)
    assert model.training
    assert found.domains == tuple(cache.domains)
    for n, name in enumerate(cache.domains):
        numbers = sample(name, cache.extents(name, "validation"), 5)
        expected = plainly(model, cache, name, numbers)
        got = (found.student_loss[n], found.teacher_loss[n], found.kl[n])
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        assert found.sizes[n] == cache.plan(name).rows("train")


def test_a_rule_takes_them_as_they_are(model: Any, cache: Cache) -> None:
    weights = DomainWeights("excess", cache.domains).update(measure_gaps(model, cache, rows=3))
    assert math.isclose(weights.sum(), 1)


def test_the_shares_of_processes_add_up(model: Any, cache: Cache) -> None:
    extents = {name: {s: cache.extents(name, s) for s in SPLITS} for name in cache.domains}
    objective = Objective(model.eval(), Terms(0.0), cache.spec.vocab_size, bf16=False)
    totals: list[list[torch.Tensor]] = [[], []]
    for rank, seen in enumerate(totals):

        def total(value: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(value.clone())
            return value

        share, device = slice(rank, None, 2), torch.device("cpu")
        meter = GapMeter(cache, extents, 5, 2, device, share=share, total=total)
        meter.measure(objective.measure)
    alone = measure_gaps(model, cache, rows=5, batch_rows=2)
    for n, (first, second) in enumerate(zip(*totals, strict=True)):
        loss, kl, positions = (first + second).sum(1).tolist()
        assert loss / positions == pytest.approx(alone.student_loss[n])
        assert kl / positions == pytest.approx(alone.kl[n])


def test_the_error_of_a_fall_is_that_of_its_rows() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(3, 1, 40), rng.normal(2, 1, 40)
    even = fall_error(16 * before, 16 * after, np.full(40, 16.0))
    assert even == pytest.approx((before - after).std(ddof=1) / math.sqrt(40))
    assert math.isnan(fall_error(before[:1], after[:1], np.ones(1)))
    # Rows of other lengths: the spread of the estimate over many samples.
    drawn = []
    for _ in range(2000):
        positions = rng.integers(1, 20, 50).astype(float)
        falls = positions * rng.normal(1, 1, 50)
        drawn.append((falls.sum() / positions.sum(), fall_error(falls, 0 * falls, positions)))
    found, errors = np.array(drawn).T
    assert errors.mean() == pytest.approx(found.std(), rel=0.1)


def test_what_is_remembered_of_rows_fits_the_same_rows_alone(model: Any, cache: Cache) -> None:
    meter = gap_meter(model, cache, 5, 2)
    first, second = measure_with(meter, model), measure_with(meter, model)
    assert np.isnan(first.fall_error).all()
    np.testing.assert_array_equal(second.fall_error, 0)
    again, other = gap_meter(model, cache, 5, 2), gap_meter(model, cache, 4, 2)
    for one in (again, other):
        one.load_state_dict(meter.state_dict())
    np.testing.assert_array_equal(measure_with(again, model).fall_error, 0)
    assert np.isnan(measure_with(other, model).fall_error).all()


def test_a_sample_depends_on_the_rows_alone_and_spreads(cache: Cache) -> None:
    extents = cache.extents("letters", "validation")
    whole = cache.row_numbers("letters", "validation")
    assert sample("letters", extents, 10**6).tolist() == whole.tolist()
    some = sample("letters", extents, 4)
    assert some.tolist() == sorted(set(some.tolist()))
    assert set(some.tolist()) <= set(whole.tolist())
    assert some.tolist() == sample("letters", extents, 4).tolist()
