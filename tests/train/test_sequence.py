"""Log-probabilities of responses and their gradients against a dense reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_train.loss import head as heads
from ddk_train.loss.fused import Terms
from ddk_train.loss.head import Head
from ddk_train.loss.objective import Objective
from ddk_train.loss.sequence import row_sums, token_logprobs
from tests.sequences import Material


@settings(deadline=None, max_examples=40)
@given(
    P=st.integers(0, 9),
    V=st.integers(1, 30),
    seed=st.integers(0, 99),
    chunk=st.integers(1, 10),
    scale=st.sampled_from([1.0, 0.5]),
    cap=st.sampled_from([0.0, 3.0]),
    bias=st.booleans(),
    narrow=st.booleans(),
)
def test_values_and_gradients_agree_with_the_reference(
    P: int, V: int, seed: int, chunk: int, scale: float, cap: float, bias: bool, narrow: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=g) for shape in ((P, 7), (V, 7), (V,))]
    labels, weight_P = torch.randint(V, (P,), generator=g), torch.randn(P, generator=g)
    hidden, weight, shift = (t.clone().requires_grad_() for t in made)
    head = Head(weight, shift if bias else None, scale, cap, narrow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "LEAST_POSITIONS", chunk)
        patch.setattr(heads, "CHUNK_BYTES", {"cpu": 0, "cuda": 0})
        got = token_logprobs(hidden, head, labels)
        (got * weight_P).sum().backward()
    exact = [t.double().requires_grad_() for t in made]
    z = (exact[0] @ exact[1].T + (exact[2] if bias else 0)) * scale
    z = cap * torch.tanh(z / cap) if cap else z
    expected = z.log_softmax(-1)[torch.arange(P), labels]
    (expected * weight_P.double()).sum().backward()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip((hidden, weight, shift)[: 2 + bias], exact, strict=False):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_values_of_a_row_are_summed_by_its_mask() -> None:
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    sums = row_sums(torch.tensor([1.0, 2.0, 4.0]), mask)
    assert sums.tolist() == [3.0, 0.0, 4.0]


def test_log_probabilities_are_those_of_transformers(material: Material) -> None:
    model = material.responder("student").model
    objective = Objective(model, Terms(0.0), 300, bf16=False)
    tokens = torch.randint(257, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 19, dtype=torch.bool)
    for row, (first, last) in enumerate(((4, 19), (0, 3), (7, 8))):
        mask[row, first:last] = True
    got = objective(tokens, mask, None, apart=True)
    logq = model(tokens).logits[:, :-1].log_softmax(-1)
    expected = logq.gather(-1, tokens[:, 1:, None])[..., 0][mask]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
