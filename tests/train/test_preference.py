"""Losses on pairs: by hand, and against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch

from ddk_train.loss.preference import PAIR_LOSSES, PairTerms


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def test_dpkd_by_hand() -> None:
    # The student is 0.5 nats per token worse than the teacher on 4 tokens, 1 better on 2.
    terms = PairTerms("dpkd", beta=0.1)
    loss, reward = terms(numbers(-6.0, -1.0), numbers(-4.0, -3.0), torch.tensor([[4, 2]]))
    torch.testing.assert_close(reward, numbers(-0.05, 0.1))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.15)))
    # Without lengths: 0.1 · (−2) and 0.1 · 2.
    sums = PairTerms("dpkd", beta=0.1, per_token=False)
    loss, reward = sums(numbers(-6.0, -1.0), numbers(-4.0, -3.0), torch.tensor([[4, 2]]))
    torch.testing.assert_close(reward, numbers(-0.2, 0.2))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.4)))


def test_plad_by_hand() -> None:
    terms = PairTerms("plad", margin=1.0)
    given = numbers(-6.0, -1.0), numbers(0.0, 0.0), torch.tensor([[4, 2]])
    loss, reward = terms(*given)  # −1.5 and −0.5 per token
    torch.testing.assert_close(reward, numbers(-1.5, -0.5))
    assert loss.item() == pytest.approx(2.0)
    loss, _ = terms(numbers(-1.0, -9.0), *given[1:])  # −0.25 and −4.5: beyond the margin
    assert loss.item() == 0.0


def test_equal_responses_of_equal_models_cost_log_two() -> None:
    same = numbers(-5.0, -5.0)
    loss, _ = PairTerms("dpkd")(same, same, torch.tensor([[3, 3]]))
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("per_token", [True, False])
def test_value_and_gradient_agree_with_the_formula(name: str, per_token: bool) -> None:
    g = torch.Generator().manual_seed(0)
    logq, logp = (-20 * torch.rand(50, 2, generator=g) for _ in range(2))
    length = torch.randint(1, 9, (50, 2), generator=g)
    logq.requires_grad_()
    loss, _ = PairTerms(name, beta=0.3, margin=0.7, per_token=per_token)(logq, logp, length)
    loss.sum().backward()
    q, p = logq.detach().double().requires_grad_(), logp.double()
    n = length.double() if per_token else torch.ones(50, 2).double()
    if name == "dpkd":
        r = 0.3 / n * (q - p)
        expected = -torch.sigmoid(r[:, 0] - r[:, 1]).log()
    else:
        r = q / n
        expected = torch.relu(0.7 - r[:, 0] + r[:, 1])
    expected.sum().backward()
    assert logq.grad is not None
    assert q.grad is not None
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logq.grad.double(), q.grad, rtol=1e-4, atol=1e-6)


def test_a_far_pair_has_a_finite_loss() -> None:
    loss, _ = PairTerms("dpkd", beta=1.0)(numbers(-9e4, -1.0), numbers(-1.0, -1.0),
                                          torch.tensor([[1, 1]]))  # fmt: skip
    assert loss.item() == pytest.approx(9e4 - 1, rel=1e-6)
