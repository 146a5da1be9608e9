"""Logits → sparse targets, against float64 references."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_cache.build import targets
from ddk_cache.format.codec import ZERO, LogprobCodec
from ddk_cache.format.spec import TargetSpec
from ddk_cache.types import Array, SparseTargets
from tests.helpers import sharp


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
    scores = targets.extract(logits, labels, TargetSpec("topk", k, 1.0))
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


@pytest.mark.parametrize("mass", [0.3, 0.9, 0.9995])
def test_topk_stops_where_the_kept_mass_is_reached(mass: float) -> None:
    logits = sharp(300)[None]
    labels = torch.zeros(1, 40, dtype=torch.long)
    scores = targets.extract(logits, labels, TargetSpec("topk", 50, mass))
    whole = targets.extract(logits, labels, TargetSpec("topk", 50, 1.0))
    kept = scores.ids >= 0
    assert len(kept.sum(-1).unique()) > 1
    assert torch.equal(scores.ids[kept], whole.ids[kept])
    assert torch.equal(scores.logprobs[kept], whole.logprobs[kept])
    assert torch.isneginf(scores.logprobs[~kept]).all()
    p = logits.double().softmax(-1).gather(-1, whole.ids)
    before = p.cumsum(-1) - p
    assert (before[kept] < mass).all()
    assert (before[~kept] >= mass - 1e-6).all()
    found = scores.targets("topk")
    np.testing.assert_allclose(found.probs.sum(-1) + found.tail, 1, rtol=5e-6)


def test_numbers_that_are_not_finite_are_left_to_the_audit() -> None:
    logits, labels = torch.full((1, 3, 30), torch.nan), torch.zeros(1, 3, dtype=torch.long)
    for text in ("topk:4", "sampled:4"):
        scores = targets.extract(logits, labels, TargetSpec.parse(text))
        assert (scores.ids[..., 0] >= 0).all()
        assert scores.logprobs[..., 0].isnan().all()


def dense(kept: SparseTargets[torch.Tensor], vocab: int) -> torch.Tensor:
    """Return (P, V) float64 probabilities; padding has none."""
    whole = torch.zeros(len(kept.ids), vocab + 1, dtype=torch.float64)
    whole.scatter_add_(-1, kept.ids.where(kept.ids >= 0, vocab), kept.probs.double())
    assert (whole[:, vocab] == 0).all()
    return whole[:, :vocab]


def draws(logits: torch.Tensor, size: int, count: int, seed: int = 0) -> Iterator[targets.Scores]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(len(logits), dtype=torch.long)
    for _ in range(count):
        offsets = torch.rand(len(logits), dtype=torch.float64, generator=generator)
        yield targets.sampled(logits, labels, offsets, size)


def threshold(t: Array, n: int) -> float:
    """Return c(n), what each drawn one of n entries counts; 0 where nothing is left to draw."""
    falling = np.sort(t)[::-1]
    for head in range(n):
        c = falling[head:].sum() / (n - head)
        if falling[head] < c:
            return float(c)
    return 0.0


@settings(max_examples=200, deadline=None)
@given(
    vocab=st.sampled_from([64, 200, 1000]),
    seed=st.integers(0, 10**6),
    scale=st.floats(0.0, 12.0),
    size=st.integers(2, 64),
)
def test_entries_are_as_few_as_the_threshold_needs(
    vocab: int, seed: int, scale: float, size: int
) -> None:
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    t = logits[0].double().softmax(-1).numpy()
    (scores,) = draws(logits, size, 1, seed)
    kept, ids = scores.targets("sampled"), scores.ids[0].numpy()
    n = int((ids >= 0).sum())
    assert 1 <= n <= size
    assert (ids[:n] >= 0).all()
    assert len(set(ids[:n])) == n
    left_out = np.sort(t)[::-1][n:].sum() * size
    assert left_out < 2e-6 or threshold(t, n) <= (1 + 1e-4) / size
    if n > 1:  # one fewer would not do
        assert threshold(t, n - 1) >= (1 - 1e-4) / size
    assert float(kept.probs.sum()) == pytest.approx(1, abs=1e-5)
    assert (kept.tail == 0).all()
    head = int((~torch.isneginf(scores.logprobs[0])).sum())
    np.testing.assert_allclose(kept.probs[0, :head], t[ids[:head]], rtol=1e-4)
    np.testing.assert_allclose(t[ids[:head]], np.sort(t)[::-1][:head], rtol=1e-4)
    if head < n:
        c = kept.probs[0, head].item()
        assert c == pytest.approx(threshold(t, n), rel=1e-4) or head == 1
        assert (t[ids[head:n]] <= c * (1 + 1e-4)).all()


@pytest.mark.parametrize("size", [2, 4, 12])
@pytest.mark.parametrize("scale", [0.3, 1.5, 4.0])
def test_the_mean_of_many_draws_converges_at_the_monte_carlo_rate(size: int, scale: float) -> None:
    V, count = 200, 40_000
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(3)) * scale
    t = logits[0].double().softmax(-1)
    (scores,) = draws(logits.expand(count, V), size, 1, 1)
    values = dense(scores.targets("sampled"), V)
    drawn = (scores.ids[0] >= 0) & torch.isneginf(scores.logprobs[0])
    c = scores.tail_logprob[0].double().exp() / drawn.sum()
    spread = (t * (c - t).clamp(min=0)).sqrt()  # of an id that counts c with probability t / c
    slack = 5 * (spread / count**0.5 + c / count) + 3e-6
    assert ((values.mean(0) - t).abs() <= slack).all()
    assert values.sum(1).sub(1).abs().max() < 1e-5


def needs(logits_V: torch.Tensor, size: int) -> int:
    """Return how many entries a position needs."""
    (scores,) = draws(logits_V[None], size, 1)
    return int((scores.ids >= 0).sum())


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
        size = next(size for size in range(2, 200) if needs(logits[row], size) >= ids[row].floor())
        assert needs(logits[row], size) <= ids[row].ceil()
        ours = 0.0
        for scores in draws(logits[row : row + 1], size, count):
            value = dense(scores.targets("sampled"), 2000)
            ours += ((value - t[row]) ** 2).sum().item() / count
        assert ours <= 1.1 * theirs[row].item()


def test_a_distribution_with_fewer_ids_than_entries_is_kept_whole() -> None:
    logits = torch.full((3, 50), -torch.inf)
    logits[:, 7], logits[:, 30] = 1.0, 2.0
    for scores in draws(logits, 6, 3):
        assert (scores.ids >= 0).sum() == 3 * 2
        values = dense(scores.targets("sampled"), 50)
        torch.testing.assert_close(values.float(), logits.softmax(-1))
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
        kept = scores.ids.where(scores.ids >= 0, scores.ids[..., :1])
        outside = p.scatter(-1, kept, 0.0).sum(-1)
        np.testing.assert_allclose(
            scores.tempered_tail_logprob[..., place].exp(), outside, rtol=1e-5, atol=1e-30
        )


# --- stored integers ------------------------------------------------------------------------------
