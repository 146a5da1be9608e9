"""Logits → sparse targets → integers, against float64 references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ddk_cache import targets
from ddk_cache.codec import ZERO, LogprobCodec
from ddk_cache.schema import TargetSpec


@pytest.mark.parametrize("vocab", [5, 17, 300])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_agrees_with_a_float64_softmax(
    vocab: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(targets.CHUNK_BYTES, "cpu", 4 * vocab * 3)  # does not divide the positions
    generator = torch.Generator().manual_seed(vocab * k)
    logits = (torch.randn(2, 7, vocab, generator=generator) * 4).to(dtype)
    labels = torch.randint(vocab, (2, 7), generator=generator)
    before = logits.clone()
    scores = targets.extract(logits, labels, TargetSpec("topk", k))
    assert torch.equal(logits, before)

    p = np.exp(logits.double().numpy())
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1, kind="stable")[..., :k]
    top = np.take_along_axis(p, order, -1)
    np.testing.assert_allclose(scores.logprobs.double().exp().numpy(), top, rtol=2e-6)
    np.testing.assert_allclose(
        np.take_along_axis(p, scores.ids.numpy(), -1), top, rtol=1e-12
    )  # the ids may differ among equals, their probabilities may not
    rest = np.sort(p, -1)[..., : vocab - k].sum(-1)
    np.testing.assert_allclose(scores.tail.double().exp().numpy(), rest, rtol=1e-5)
    label = np.take_along_axis(p, labels.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores.label.double().exp().numpy(), label, rtol=2e-6)


def test_the_tail_of_a_sure_teacher_is_not_lost_to_cancellation() -> None:
    logits = torch.zeros(1, 1, 100)
    logits[..., 3] = 30.0
    scores = targets.extract(logits, torch.zeros(1, 1, dtype=torch.long), TargetSpec("topk", 1))
    expected = np.log(99.0) - np.logaddexp(30.0, np.log(99.0))
    assert scores.tail.item() == pytest.approx(expected, rel=1e-6)


def test_the_tail_is_exactly_empty_where_everything_is_kept() -> None:
    scores = targets.extract(
        torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.long), TargetSpec("topk", 4)
    )
    assert torch.isneginf(scores.tail).all()
    assert (LogprobCodec().encode(scores.tail.numpy()) == ZERO).all()


CODEC = LogprobCodec()
logprobs = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-200, 0, width=32))


@given(logprobs)
def test_a_stored_logprob_is_within_the_stated_error(values: np.ndarray) -> None:
    decoded = CODEC.decode(CODEC.encode(values)).astype(np.float64)
    within = values >= CODEC.floor
    # Beside the grid, the decoded value is a float32 of up to 64 nats: half a unit of 2⁻¹⁸.
    assert (np.abs(decoded - values)[within] <= CODEC.error + 2.0**-18).all()
    assert (decoded[~within] == np.float32(CODEC.floor)).all()


@given(logprobs)
def test_codes_keep_the_order(values: np.ndarray) -> None:
    assert (np.diff(CODEC.encode(np.sort(values)).astype(int)) <= 0).all()


def test_zero_and_one_are_exact() -> None:
    codes = CODEC.encode(np.array([-np.inf, 0.0, 1e-7], np.float32))
    assert codes.tolist() == [ZERO, 0, 0]
    assert CODEC.probs(codes).tolist() == [0.0, 1.0, 1.0]


def test_decoded_targets_sum_to_one_and_stay_within_the_error() -> None:
    p = np.random.default_rng(0).dirichlet(np.full(20, 0.1), 500)
    ids = np.argsort(-p, -1)[:, :5]
    top = np.take_along_axis(p, ids, -1)
    with np.errstate(divide="ignore"):
        stored = CODEC.encode(np.log(top)), CODEC.encode(np.log1p(-top.sum(-1)))
    decoded = CODEC.targets(ids.astype(np.uint16), *stored)
    np.testing.assert_allclose(decoded.probs.sum(-1) + decoded.tail, 1, atol=5e-7)
    bound = np.exp(2 * CODEC.error) - 1 + 1e-6  # once by rounding, once by the common scale
    assert (np.abs(decoded.probs - top) <= bound * top + np.exp(CODEC.floor)).all()
