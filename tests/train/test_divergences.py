"""The divergences over buckets: their values, their slopes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_cache import InputError, MismatchError
from ddk_train.loss.divergences import LOSSES, check_targets, divergence
from tests.cache.test_spec import spec

NAMES = ("forward_kl", "reverse_kl", "jsd:0.5", "jsd:0.1", "skew_kl:0.1", "skew_kl:0.7")


def value(name: str, t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return a divergence (P) of full distributions, straight from its definition."""

    def kl(p: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return (torch.xlogy(p, p) - torch.xlogy(p, r)).sum(-1)

    base, _, text = name.partition(":")
    share = float(text or 0)
    mixed = share * t + (1 - share) * q
    return {
        "forward_kl": lambda: kl(t, q),
        "reverse_kl": lambda: kl(q, t),
        "jsd": lambda: share * kl(t, mixed) + (1 - share) * kl(q, mixed),
        "skew_kl": lambda: kl(t, mixed),
    }[base]()


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
    expected = value(name, t, logq.exp())
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


@pytest.mark.parametrize(
    "name", ["kl", "jsd", "jsd:", "jsd:1", "jsd:x", "skew_kl:0", "reverse_kl:1"]
)
def test_a_loss_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"unknown loss|takes a number between 0 and 1"):
        divergence(name)


def test_what_makes_no_sense_is_refused_with_the_reason() -> None:
    sampled, topk = spec(targets="sampled:8"), spec(temperatures=[0.5, 2.0])
    check_targets("forward_kl", 1.0, sampled)
    check_targets("jsd:0.5", 2.0, topk)
    for name in LOSSES[1:]:
        with pytest.raises(InputError, match="was not drawn, which is not zero"):
            check_targets(name, 1.0, sampled)
    with pytest.raises(MismatchError, match="biased at any other"):
        check_targets("forward_kl", 2.0, sampled)
    with pytest.raises(MismatchError, match=r"temperature 4.* at 0\.5, 1, 2;"):
        check_targets("forward_kl", 4.0, topk)
