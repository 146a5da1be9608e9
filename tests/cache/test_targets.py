"""Logits → sparse targets, against float64 references."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ddk_cache.build import targets
from ddk_cache.format.codec import ZERO, LogprobCodec
from ddk_cache.format.spec import TargetSpec


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
    np.testing.assert_allclose(scores.tail_logprob.double().exp().numpy(), rest, rtol=1e-5)
    label = np.take_along_axis(p, labels.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores.label_logprob.double().exp().numpy(), label, rtol=2e-6)


def test_the_tail_of_a_sure_teacher_is_not_lost_to_cancellation() -> None:
    logits = torch.zeros(1, 1, 100)
    logits[..., 3] = 30.0
    scores = targets.extract(logits, torch.zeros(1, 1, dtype=torch.long), TargetSpec("topk", 1))
    expected = np.log(99.0) - np.logaddexp(30.0, np.log(99.0))
    assert scores.tail_logprob.item() == pytest.approx(expected, rel=1e-6)


def test_the_tail_is_exactly_empty_where_everything_is_kept() -> None:
    scores = targets.extract(
        torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.long), TargetSpec("topk", 4)
    )
    assert torch.isneginf(scores.tail_logprob).all()
    assert (LogprobCodec().encode(scores.tail_logprob.numpy()) == ZERO).all()


def sharp(vocab: int, positions: int = 40) -> torch.Tensor:
    """Return logits from flat to nearly sure."""
    generator = torch.Generator().manual_seed(vocab)
    scale = torch.linspace(0.1, 8, positions)[:, None]
    return torch.randn(positions, vocab, generator=generator) * scale


def draws(logits: torch.Tensor, size: int, count: int, seed: int = 0) -> Iterator[targets.Scores]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(len(logits), dtype=torch.long)
    for _ in range(count):
        offsets = torch.rand(len(logits), dtype=torch.float64, generator=generator)
        yield targets.sampled(logits, labels, offsets, size)


@pytest.mark.parametrize(("vocab", "size"), [(5, 2), (130, 8), (1000, 12), (16_384, 12)])
def test_sampled_targets_are_right_on_average_and_sum_to_one(vocab: int, size: int) -> None:
    logits, count = sharp(vocab), 1500
    t = logits.double().softmax(-1)
    total = torch.zeros_like(t)
    for scores in draws(logits, size, count):
        kept = scores.targets("sampled")
        assert (kept.probs.sum(-1) - 1).abs().max() < 1e-5
        assert (kept.tail == 0).all()
        ranked = kept.ids.sort(-1).values
        assert (ranked[:, 1:] != ranked[:, :-1]).all()
        total += torch.zeros_like(t).scatter_(-1, kept.ids, kept.probs.double())
        drawn = torch.isneginf(scores.logprobs)
        c = kept.probs.where(drawn, 0.0).max(-1, keepdim=True).values.double()
    # Bernstein's bound of a mean of values that are c with probability t / c and 0 else.
    slack = 6 * (t * c / count).sqrt() + 12 * c / count + 1e-5 * t
    assert ((total / count - t).abs() <= slack).all()


def threshold(t: np.ndarray, size: int) -> tuple[int, float]:
    """Return the head and the threshold of one distribution, by trying every head."""
    ranked = np.sort(t)[::-1]
    for head in range(1, size):
        c = ranked[head:].sum() / (size - head)
        if ranked[head] < c:
            return head, c
    return size, 0.0


@pytest.mark.parametrize(("vocab", "size"), [(5, 2), (130, 8), (1000, 12)])
def test_the_head_is_exact_and_the_rest_has_the_threshold(vocab: int, size: int) -> None:
    logits = sharp(vocab)
    t = logits.double().softmax(-1).numpy()
    (scores,) = draws(logits, size, 1)
    kept = scores.targets("sampled")
    for row in range(len(t)):
        head, c = threshold(t[row], size)
        assert (~torch.isneginf(scores.logprobs[row])).sum() == head
        ids, probs = kept.ids[row].numpy(), kept.probs[row].numpy()
        np.testing.assert_allclose(probs[:head], np.sort(t[row])[::-1][:head], rtol=1e-5)
        np.testing.assert_allclose(probs[:head], t[row][ids[:head]], rtol=1e-5)
        np.testing.assert_allclose(probs[head:], c, rtol=1e-4)
        assert (t[row][ids[head:]] <= c).all()


def test_at_equal_ids_the_error_is_at_most_that_of_drawing_with_replacement() -> None:
    logits = sharp(2000, 60)
    t, draws_each, count = logits.double().softmax(-1), 50, 200
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(t, draws_each * count, replacement=True, generator=generator)
    theirs, ids = torch.zeros(len(t)).double(), torch.zeros(len(t)).double()
    for part in drawn.split(draws_each, -1):
        value = torch.zeros_like(t).scatter_add_(-1, part, torch.full(part.shape, 1 / 50).double())
        theirs += ((value - t) ** 2).sum(-1) / count
        ids += (value > 0).sum(-1) / count
    for row in range(0, len(t), 6):
        size = max(2, round(ids[row].item()))
        ours = 0.0
        for scores in draws(logits[row : row + 1], size, count):
            kept = scores.targets("sampled")
            value = torch.zeros(1, 2000).double().scatter_(-1, kept.ids, kept.probs.double())
            ours += ((value - t[row]) ** 2).sum().item() / count
        assert ours <= 1.1 * theirs[row].item()


def test_a_distribution_with_fewer_ids_than_entries_is_kept_whole() -> None:
    logits = torch.full((3, 50), -torch.inf)
    logits[:, 7], logits[:, 30] = 1.0, 2.0
    for scores in draws(logits, 6, 3):
        kept = scores.targets("sampled")
        dense = torch.zeros(3, 50).scatter_(-1, kept.ids, kept.probs)
        torch.testing.assert_close(dense, logits.softmax(-1))
        assert torch.isneginf(scores.tail_logprob).all()


@pytest.mark.parametrize("vocab", [5, 100, 257, 5000])
@pytest.mark.parametrize("k", [1, 4, 5])
def test_the_largest_are_those_of_a_plain_topk(vocab: int, k: int) -> None:
    logits = sharp(vocab)
    values, ids = targets.largest(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(logits.gather(-1, ids), values)


def test_the_mass_outside_is_kept_at_declared_temperatures() -> None:
    logits = sharp(300).reshape(2, 20, 300)
    labels = torch.zeros(2, 20, dtype=torch.long)
    scores = targets.extract(logits, labels, TargetSpec("topk", 8), temperatures=(0.5, 4.0))
    for place, temperature in enumerate((0.5, 4.0)):
        p = (logits.double() / temperature).softmax(-1)
        outside = p.scatter(-1, scores.ids, 0.0).sum(-1)
        np.testing.assert_allclose(
            scores.tempered_tail_logprob[..., place].exp(), outside, rtol=1e-5, atol=1e-30
        )


# --- stored integers ------------------------------------------------------------------------------
