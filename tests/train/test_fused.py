"""The fused head: loss, dh, dW and db against a dense reference in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_cache import SparseTargets
from ddk_train.loss import head as heads
from ddk_train.loss.divergences import divergence
from ddk_train.loss.fused import Targets, Terms, fused_loss, measure, within
from ddk_train.loss.head import Head
from tests.helpers import divergence_by_definition

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)


class Case(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    labels: torch.Tensor
    targets: Targets


def case(P: int, V: int, k: int, seed: int, *, tail: bool = True, H: int = 7) -> Case:
    """Return hidden states, a head, labels, and targets of another distribution."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(P, H, generator=g), torch.randn(V, H, generator=g)
    bias, teacher = torch.randn(V, generator=g), 3 * torch.randn(P, V, generator=g)
    labels = torch.randint(V, (P,), generator=g)
    probs, ids = teacher.double().softmax(-1).sort(-1, descending=True)
    rest = probs[:, k:].sum(-1)
    probs, ids = probs[:, :k], ids[:, :k]
    if not tail:
        probs, rest = probs / probs.sum(-1, keepdim=True), torch.zeros_like(rest)
    return Case(hidden, weight, bias, labels, SparseTargets(ids, probs.float(), rest.float()))


def reference(c: Case, head: Head, name: str, gamma: float, T: float) -> tuple[torch.Tensor, ...]:
    """Return loss, CE, D, dh, dW, db: dense, slow, from the definitions, by autograd."""
    hidden, weight, bias = (t.double().requires_grad_() for t in (c.hidden, c.weight, c.bias))
    z = hidden @ weight.T
    if head.bias is not None:
        z = z + bias
    z = z * head.scale
    if head.cap:
        z = head.cap * torch.tanh(z / head.cap)
    ce = z.logsumexp(-1) - z[torch.arange(len(z)), c.labels]
    q = torch.nn.functional.pad((z / T).softmax(-1), (0, 1))  # padding has no probability
    ids = c.targets.ids.where(c.targets.ids >= 0, z.shape[-1])
    kept = torch.zeros_like(q, dtype=torch.bool).scatter(-1, ids, True)
    rest = q.masked_fill(kept, 0).sum(-1, keepdim=True)
    q = torch.cat([q.gather(-1, ids), rest], -1)
    t = torch.cat([c.targets.probs, c.targets.tail[:, None]], -1).double()
    some = (t > 0) | (q > 0)  # a bucket with nothing in it is none
    d = T**2 * divergence_by_definition(name, t.where(some, 1.0), q.where(some, 1.0))
    loss = ce.sum() + gamma * d.sum()
    grads = torch.autograd.grad(loss, (hidden, weight, bias), allow_unused=True)
    made = (torch.zeros_like(c.bias) if g is None else g for g in grads)
    return loss.detach(), ce.sum().detach(), d.sum().detach(), *made


def fused(c: Case, head: Head, name: str, gamma: float, T: float) -> tuple[torch.Tensor, ...]:
    hidden, weight, bias = (t.clone().requires_grad_() for t in (c.hidden, c.weight, c.bias))
    head = Head(weight, None if head.bias is None else bias, head.scale, head.cap)
    sums = fused_loss(hidden, head, c.labels, c.targets, Terms(gamma, divergence(name), T))
    sums.loss.backward()
    made = [torch.zeros_like(t) if t.grad is None else t.grad for t in (hidden, weight, bias)]
    return sums.loss.detach(), sums.ce, sums.divergence, *made


def agree(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tol: float) -> None:
    for one, other in zip(got, expected, strict=True):
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other.double(), rtol=tol, atol=tol * (1 + scale))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd:0.3", "skew_kl:0.2"])
@pytest.mark.parametrize("T", TEMPERATURES)
@settings(deadline=None, max_examples=25)
@given(
    P=st.integers(0, 9),
    V=st.integers(2, 40),
    k=st.integers(1, 40),
    seed=st.integers(0, 99),
    chunk=st.integers(1, 10),
)
def test_loss_and_gradients_agree_with_the_reference(
    name: str, T: float, P: int, V: int, k: int, seed: int, chunk: int
) -> None:
    c, head = case(P, V, min(k, V), seed), Head()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "LEAST_POSITIONS", chunk)
        patch.setattr(heads, "CHUNK_BYTES", {"cpu": 0, "cuda": 0})
        got = fused(c, head, name, 0.7, T)
    agree(got, reference(c, head, name, 0.7, T), 3e-4 if name == "reverse_kl" else 5e-5)


@settings(deadline=None, max_examples=40)
@given(
    P=st.integers(1, 6),
    V=st.integers(2, 12),
    k=st.integers(1, 12),
    seed=st.integers(0, 99),
    T=st.sampled_from([1.0, 2.0]),
)
def test_dpkd_finds_the_students_likeliest_token_outside_of_the_kept(
    P: int, V: int, k: int, seed: int, T: float
) -> None:
    c, beta, gamma = padded(case(P, V, min(k, V), seed), seed), 0.3, 0.7
    got = fused(c, Head(), f"dpkd:{beta}", gamma, T)
    hidden, weight = (t.double().requires_grad_() for t in (c.hidden, c.weight))
    z = hidden @ weight.T
    logq, losses = (z / T).log_softmax(-1), []
    for n in range(P):
        t = {int(i): float(p) for i, p in zip(c.targets.ids[n], c.targets.probs[n], strict=True)}
        t.pop(-1, None)
        y_t, y_s = max(t, key=lambda i: t[i]), int(z[n].argmax())
        share = float(c.targets.tail[n]) / (V - len(t)) if len(t) < V else 0.0
        ratio = max(t[y_t], 1.2e-38) / max(t.get(y_s, share), 1.2e-38)
        u = beta * (logq[n, y_t] - logq[n, y_s] - torch.tensor(ratio, dtype=torch.float64).log())
        losses.append(-torch.nn.functional.logsigmoid(u))
    ce = z.logsumexp(-1) - z[torch.arange(P), c.labels]
    d = T**2 * torch.stack(losses).sum()
    loss = ce.sum() + gamma * d
    grads = torch.autograd.grad(loss, (hidden, weight))
    nothing = torch.zeros_like(c.bias)
    agree(got, (loss.detach(), ce.sum().detach(), d.detach(), *grads, nothing), 5e-5)


def padded(c: Case, seed: int) -> Case:
    """Return the case with 1 to K entries at each position; the tail takes what the others had."""
    ids, probs, tail = c.targets.ids, c.targets.probs, c.targets.tail
    count = torch.randint(1, ids.shape[1] + 1, (len(ids), 1), generator=torch.manual_seed(seed))
    beyond = torch.arange(ids.shape[1]) >= count
    tail = tail + (probs * beyond).sum(-1)
    return c._replace(
        targets=SparseTargets(ids.masked_fill(beyond, -1), probs.masked_fill(beyond, 0.0), tail)
    )


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd:0.3", "skew_kl:0.2"])
@pytest.mark.parametrize("T", TEMPERATURES)
@settings(deadline=None, max_examples=15)
@given(P=st.integers(1, 9), V=st.integers(2, 40), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_padding_has_no_gradient(name: str, T: float, P: int, V: int, k: int, seed: int) -> None:
    c = padded(case(P, V, min(k, V), seed), seed)
    got = fused(c, Head(), name, 0.7, T)
    assert all(part.isfinite().all() for part in got)
    tolerance = 3e-4 if name == "reverse_kl" else 5e-5
    agree(got, reference(c, Head(), name, 0.7, T), tolerance)
    # Each position by itself, at its own width.
    alone = torch.zeros_like(c.hidden)
    for p in range(P):
        part = slice(p, p + 1)
        n = int((c.targets.ids[p] >= 0).sum())
        one = SparseTargets(
            c.targets.ids[part, :n], c.targets.probs[part, :n], c.targets.tail[part]
        )
        own = Case(c.hidden[part], c.weight, c.bias, c.labels[part], one)
        alone[part] = fused(own, Head(), name, 0.7, T)[3]
    torch.testing.assert_close(got[3], alone, rtol=1e-5, atol=1e-5)


def test_padding_is_measured_as_nothing() -> None:
    c = padded(case(30, 40, 6, 3), 3)
    _, ce, kl, *_ = reference(c, Head(), "forward_kl", 1.0, 1.0)
    got = measure(c.hidden, Head(c.weight), c.labels, c.targets).double().sum(1)
    torch.testing.assert_close(got, torch.stack([ce, kl]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("T", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 5, 30])
def test_without_a_tail_as_sampled_targets_are(T: float, k: int) -> None:
    c = case(11, 30, k, 3, tail=False)
    agree(fused(c, Head(), "forward_kl", 0.5, T), reference(c, Head(), "forward_kl", 0.5, T), 5e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 3.0), (2.0, 5.0)])
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_bias_scale_and_cap(bias: bool, scale: float, cap: float, T: float) -> None:
    c = case(13, 33, 4, 5)
    head = Head(None, c.bias if bias else None, scale, cap)
    agree(fused(c, head, "forward_kl", 0.3, T), reference(c, head, "forward_kl", 0.3, T), 5e-5)


def test_bfloat16_products_stay_within_its_precision() -> None:
    c = case(64, 50, 8, 7)
    c = c._replace(hidden=c.hidden.bfloat16().float(), weight=c.weight.bfloat16().float())
    hidden, weight = c.hidden.bfloat16().requires_grad_(), c.weight.clone().requires_grad_()
    sums = fused_loss(hidden, Head(weight), c.labels, c.targets, Terms(0.5))
    sums.loss.backward()
    loss, ce, d, dh, dw, _ = reference(c, Head(), "forward_kl", 0.5, 1.0)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    agree((sums.loss.detach(), sums.ce, sums.divergence), (loss, ce, d), 1e-2)
    agree((hidden.grad, weight.grad), (dh, dw), 1e-2)


def test_the_gradient_of_a_share_of_the_loss_is_that_share() -> None:
    c = case(9, 20, 3, 1)
    hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
    loss = fused_loss(hidden, Head(weight), c.labels, c.targets, Terms(0.5)).loss / 9
    loss.backward(retain_graph=True)
    _, _, _, dh, dw, _ = reference(c, Head(), "forward_kl", 0.5, 1.0)
    assert hidden.grad is not None
    assert weight.grad is not None
    agree((hidden.grad, weight.grad), (dh / 9, dw / 9), 5e-5)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_a_frozen_head_gets_no_gradient_and_plain_logits_the_same_loss() -> None:
    c = case(9, 20, 3, 2)
    expected = reference(c, Head(), "forward_kl", 0.5, 1.0)
    hidden = c.hidden.clone().requires_grad_()
    fused_loss(hidden, Head(c.weight), c.labels, c.targets, Terms(0.5)).loss.backward()
    assert hidden.grad is not None
    agree((hidden.grad,), (expected[3],), 5e-5)
    logits = (c.hidden @ c.weight.T).requires_grad_()
    sums = fused_loss(logits, Head(), c.labels, c.targets, Terms(0.5))
    sums.loss.backward()
    assert logits.grad is not None
    agree((sums.loss.detach(), logits.grad @ c.weight), (expected[0], expected[3]), 5e-5)


def test_cross_entropy_alone_is_that_of_torch() -> None:
    c = case(300, 40, 3, 4)
    expected = torch.nn.functional.cross_entropy(c.hidden @ c.weight.T, c.labels, reduction="sum")
    alone = fused_loss(c.hidden, Head(c.weight), c.labels, None, Terms(0.5))
    for got in (alone.loss, alone.ce):
        torch.testing.assert_close(got.float(), expected)


@pytest.mark.parametrize(("P", "k", "tail"), [(300, 3, True), (5, 40, True), (9, 4, False)])
def test_what_is_measured_is_the_reference(P: int, k: int, tail: bool) -> None:
    c = case(P, 40, k, 7, tail=tail)
    head = Head(c.weight, c.bias, scale=0.5, cap=3.0)
    _, ce, kl, *_ = reference(c, head, "forward_kl", 1.0, 1.0)
    got = measure(c.hidden, head, c.labels, c.targets).double().sum(1)
    torch.testing.assert_close(got, torch.stack([ce, kl]).detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_compiled_passes_give_the_same() -> None:
    c = case(300, 40, 3, 6)

    def run(compiled: bool) -> tuple[torch.Tensor, ...]:
        hidden = c.hidden.clone().requires_grad_()
        terms = Terms(0.5, compiled=compiled)
        sums = fused_loss(hidden, Head(c.weight), c.labels, c.targets, terms)
        sums.loss.backward()
        assert hidden.grad is not None
        return sums.loss.detach(), sums.divergence, hidden.grad

    agree(run(True), run(False), 1e-5)


def test_ids_that_only_the_teacher_has_belong_to_the_rest() -> None:
    c = case(6, 10, 4, 5)
    ids, probs, tail = c.targets.ids, c.targets.probs, c.targets.tail
    wide = SparseTargets(ids, probs, tail + 0.1)
    beyond = SparseTargets(
        torch.cat([ids, torch.full((6, 1), 11)], -1),
        torch.cat([probs, torch.full((6, 1), 0.1)], -1),
        tail,
    )

    def run(head: Head, targets: Targets) -> tuple[torch.Tensor, ...]:
        weight = c.weight.clone().requires_grad_()
        head = Head(weight, narrow=head.narrow)
        sums = fused_loss(c.hidden, head, c.labels, targets, Terms(0.5))
        sums.loss.backward()
        assert weight.grad is not None
        return sums.loss.detach(), sums.divergence, weight.grad

    agree(run(Head(), wide), run(Head(narrow=True), within(beyond, 10)), 1e-6)


def test_a_student_sure_of_the_kept_ids_gets_a_finite_gradient() -> None:
    logits = torch.full((1, 50), -60.0)
    logits[0, 0] = 60.0
    targets = SparseTargets(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.2]]), torch.tensor([0.3]))
    z = logits.double().requires_grad_()
    logq = z.log_softmax(-1)
    rest = logq[0, 2:].logsumexp(-1)
    kl = -0.5 * logq[0, 0] - 0.2 * logq[0, 1] - 0.3 * rest
    kl = kl + sum(p * torch.tensor(p).log() for p in (0.5, 0.2, 0.3))
    (kl - logq[0, 0]).backward()
    logits.requires_grad_()
    sums = fused_loss(logits, Head(), torch.tensor([0]), targets, Terms(1.0))
    sums.loss.backward()
    assert logits.grad is not None
    assert z.grad is not None
    torch.testing.assert_close(sums.divergence.double(), kl.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), z.grad, rtol=1e-5, atol=1e-5)
