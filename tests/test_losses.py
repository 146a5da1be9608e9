"""The loss and its gradient against a dense float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_cache import SparseTargets
from ddk_train.losses import ce_and_kl

Case = tuple[torch.Tensor, torch.Tensor, SparseTargets[torch.Tensor]]


def case(positions: int, vocab: int, k: int, seed: int, scale: float = 3.0) -> Case:
    """Return student logits (P, V), labels (P) and top-k targets of another distribution."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, positions, vocab, generator=generator).mul(scale).unbind()
    labels = torch.randint(vocab, (positions,), generator=generator)
    probs, ids = teacher.double().softmax(-1).sort(-1, descending=True)
    probs, ids, tail = probs[:, :k], ids[:, :k], probs[:, k:].sum(-1)
    return logits, labels, SparseTargets(ids, probs.float(), tail.float())


def reference(
    logits: torch.Tensor, labels: torch.Tensor, targets: SparseTargets[torch.Tensor], gamma: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return CE (P), KL (P) and the gradient (P, V) of Σ CE + γ KL, dense and in float64."""
    z = logits.double().numpy()
    P, V = z.shape
    q = np.exp(z - z.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    ce, kl, gradient = np.zeros(P), np.zeros(P), np.zeros((P, V))
    for p in range(P):
        label = int(labels[p])
        ce[p] = -np.log(q[p, label])
        onehot = np.eye(V)[label]
        t = np.zeros(V)
        t[targets.ids[p].numpy()] = targets.probs[p].double().numpy()
        kept = np.isin(np.arange(V), targets.ids[p].numpy())
        tail, rest = float(targets.tail[p]), q[p, ~kept].sum()
        for j in np.flatnonzero(kept):
            kl[p] += t[j] * np.log(t[j] / q[p, j])
        kl[p] += tail * np.log(tail / rest) if tail else 0.0
        outside = q[p] * (1 - tail / rest) if tail else q[p]
        # Σ t + τ is one only to float32, and so is the factor of q in the exact gradient.
        mass = t.sum() + tail
        of_kl = np.where(kept, mass * q[p] - t, outside + (mass - 1) * q[p])
        gradient[p] = q[p] - onehot + gamma * of_kl
    return ce, kl, gradient


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6), st.integers(2, 40), st.integers(1, 40), st.integers(0, 99), st.floats(0.1, 9)
)
def test_loss_and_gradient_agree_with_the_reference(
    positions: int, vocab: int, k: int, seed: int, scale: float
) -> None:
    logits, labels, targets = case(positions, vocab, min(k, vocab), seed, scale)
    logits.requires_grad_()
    ce, kl = ce_and_kl(logits, labels, targets)
    (ce.sum() + 0.7 * kl.sum()).backward()
    expected_ce, expected_kl, gradient = reference(logits.detach(), labels, targets, 0.7)
    np.testing.assert_allclose(ce.detach(), expected_ce, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(kl.detach(), expected_kl, rtol=1e-5, atol=5e-5)
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad, gradient, atol=3e-5)


def test_the_divergence_is_zero_where_student_and_teacher_agree() -> None:
    logits, labels, _ = case(4, 30, 5, 1)
    probs, ids = logits.double().softmax(-1).topk(5)
    targets = SparseTargets(ids, probs.float(), (1 - probs.sum(-1)).float())
    _, kl = ce_and_kl(logits.requires_grad_(), labels, targets)
    kl.sum().backward()
    assert kl.abs().max() < 1e-5
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-5


def test_an_empty_tail_adds_nothing_and_no_nan() -> None:
    logits, labels, targets = case(3, 6, 6, 2)
    some = SparseTargets(targets.ids[:, :4], targets.probs[:, :4], torch.zeros(3))
    for given_targets in (targets, some):
        logits = logits.detach().requires_grad_()
        _, kl = ce_and_kl(logits, labels, given_targets)
        kl.sum().backward()
        assert logits.grad is not None
        assert torch.isfinite(kl).all()
        assert torch.isfinite(logits.grad).all()


def test_a_student_sure_of_the_kept_ids_gets_a_finite_gradient() -> None:
    logits = torch.full((1, 50), -60.0)
    logits[0, 0] = 60.0
    logits.requires_grad_()
    targets = SparseTargets(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.2]]), torch.tensor([0.3]))
    ce, kl = ce_and_kl(logits, torch.tensor([0]), targets)
    (ce + kl).sum().backward()
    _, expected, gradient = reference(logits.detach(), torch.tensor([0]), targets, 1.0)
    np.testing.assert_allclose(kl.detach(), expected, rtol=1e-5)
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad, gradient, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits, labels, targets = case(5, 30, 4, 3)
    short = logits.to(dtype)
    ce, kl = ce_and_kl(short, labels, targets)
    expected_ce, expected_kl, _ = reference(short.float(), labels, targets, 1.0)
    np.testing.assert_allclose(ce, expected_ce, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kl, expected_kl, rtol=1e-5, atol=2e-5)
