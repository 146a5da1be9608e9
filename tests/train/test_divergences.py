"""The divergences over buckets: their values, their slopes, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_cache import InputError, MismatchError
from ddk_train.loss.divergences import LOSSES, check_targets, divergence
from tests.helpers import divergence_by_definition, make_spec

NAMES = ("forward_kl", "reverse_kl", "jsd:0.5", "jsd:0.1", "skew_kl:0.1", "skew_kl:0.7")


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99), st.floats(0.1, 8))
def test_value_and_slope_follow_the_definition(
    name: str, positions: int, buckets: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, positions, buckets)
    teacher, student = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    t, logq = teacher.softmax(-1), student.log_softmax(-1).requires_grad_()
    expected = divergence_by_definition(name, t, logq.exp())
    (slope,) = torch.autograd.grad(expected.sum(), logq)
    got, got_slope = divergence(name)(t.float(), logq.detach().float())
    torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_slope.double(), slope, rtol=1e-4, atol=1e-5)
    assert (got > -1e-5).all()


@pytest.mark.parametrize("name", NAMES)
def test_agreement_is_zero_and_nothing_is_not_a_number(name: str) -> None:
    t = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0]])
    same, slope = divergence(name)(t, t.log())
    torch.testing.assert_close(same, torch.zeros(3), atol=1e-6, rtol=0)
    assert torch.isfinite(slope).all()
    far, slope = divergence(name)(t, t.roll(1, -1).clamp_min(1e-30).log())
    assert torch.isfinite(far).all()
    assert torch.isfinite(slope).all()


def test_dpkd_by_hand() -> None:
    # Teacher: id 0. Student: id 1. log q: −2 and −1, log t: log 0.6 and log 0.3; the rest is no id.
    t, logq = torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([[-2.0, -1.0, -0.1]])
    loss, slope = divergence("dpkd:0.5")(t, logq)
    z = 0.5 * ((-2 + 1) - math.log(0.6 / 0.3))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-z)))
    down = -0.5 / (1 + math.exp(z))
    torch.testing.assert_close(slope, torch.tensor([[down, -down, 0.0]]))
    loss, slope = divergence("dpkd")(t, torch.tensor([[-0.5, -3.0, -0.1]]))
    assert loss.item() == pytest.approx(math.log(2))  # both prefer id 0
    assert not slope.any()


@pytest.mark.parametrize(
    "name", ["kl", "jsd", "jsd:", "jsd:1", "jsd:x", "skew_kl:0", "reverse_kl:1"]
)
def test_an_unknown_loss_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"unknown loss|expected a number between 0 and 1"):
        divergence(name)


def test_a_loss_that_the_targets_cannot_give_is_refused() -> None:
    sampled, topk = make_spec(targets="sampled:8"), make_spec(temperatures=[0.5, 2.0])
    check_targets("forward_kl", 1.0, sampled)
    check_targets("jsd:0.5", 2.0, topk)
    for name in LOSSES[1:]:
        with pytest.raises(InputError, match="stores them only for drawn ids"):
            check_targets(name, 1.0, sampled)
    with pytest.raises(MismatchError, match="biased at any other"):
        check_targets("forward_kl", 2.0, sampled)
    with pytest.raises(MismatchError, match=r"temperature 4.* at 0\.5, 1, 2;"):
        check_targets("forward_kl", 4.0, topk)
