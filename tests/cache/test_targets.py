"""Logits → sparse targets → integers, against float64 references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ddk_cache.build import targets
from ddk_cache.build.fidelity import compare
from ddk_cache.build.scoring import as_arrays
from ddk_cache.format.codec import ZERO, LogprobCodec, Numbering, ProbCodec, TargetCodec
from ddk_cache.format.spec import CacheSpec, TargetSpec
from ddk_cache.types import SparseTargets


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


# --- sampled targets ------------------------------------------------------------------------------


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
        assert torch.isneginf(scores.tail).all()


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
            scores.tempered[..., place].exp(), outside, rtol=1e-5, atol=1e-30
        )


# --- stored integers ------------------------------------------------------------------------------


def spec_of(**changes: Any) -> CacheSpec:
    return CacheSpec(
        **{
            **{"seq_len": 6, "vocab_size": 300, "targets": TargetSpec("topk", 5), "holdout": 0.0},
            **{"chunk_rows": 1, "shard_rows": 1, "logprob_step": 2.0**-10, "teacher": {}},
            **{"tokenizer": {}},
            **changes,
        }
    )


@given(hnp.arrays(np.float64, st.integers(1, 50), elements=st.floats(0, 1)))
def test_a_stored_probability_is_within_the_stated_error(values: np.ndarray) -> None:
    codec = ProbCodec(128)
    codes = codec.encode(values)
    off = np.abs(codec.values[codes] - values)
    assert (off <= codec.error(values) + 1e-6 * values).all()
    assert ((codes == 0) == (values == 0)).all()
    assert (np.diff(codec.encode(np.sort(values)).astype(int)) >= 0).all()
    assert codec.encode(np.array([1.0])) == 128
    assert codec.values[128] == 1


def in_order(ids: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(ids, -1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(probs, order, -1)


@given(st.data())
def test_stored_targets_come_back(data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([6, 255, 300, 70_000]))
    size = data.draw(st.integers(2, 6))
    kind = data.draw(st.sampled_from(["topk", "sampled"]))
    frequent = data.draw(st.lists(st.integers(0, vocab - 1), max_size=20, unique=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(2, 6, vocab, generator=generator) * data.draw(st.floats(0.1, 9))
    labels = torch.zeros(2, 6, dtype=torch.long)
    scores = targets.extract(logits, labels, TargetSpec(kind, size))
    spec = spec_of(vocab_size=vocab, targets=TargetSpec(kind, size))
    codec = TargetCodec(spec, frequent)
    stored = codec.encode(as_arrays([scores]))
    for name, array in stored.items():
        assert array.shape == (2, *spec.arrays[name].inner)
        assert array.dtype == spec.arrays[name].dtype
    found, wanted = codec.targets(stored), scores.targets(kind)
    np.testing.assert_allclose(found.probs.sum(-1, dtype=np.float64) + found.tail, 1, atol=2e-6)
    ids, probs = in_order(found.ids, found.probs)
    wanted_ids, wanted_probs = in_order(wanted.ids.numpy(), wanted.probs.numpy())
    np.testing.assert_array_equal(ids, wanted_ids)
    error = codec.prob.error(wanted_probs)
    # Each by its own rounding, and all by the scale that makes them sum to one again.
    scale = 1.5 * (error.sum(-1) + codec.logprob.error)
    assert (np.abs(probs - wanted_probs) <= 1.5 * error + wanted_probs * scale[..., None]).all()
    assert (np.abs(found.tail - wanted.tail.numpy()) <= wanted.tail.numpy() * scale + 1e-12).all()


def test_targets_at_a_declared_temperature_are_those_of_a_softened_teacher() -> None:
    logits = sharp(300, 12).reshape(2, 6, 300)
    spec = spec_of(targets=TargetSpec("topk", 20), temperatures=(2.0, 4.0))
    labels = torch.zeros(2, 6, dtype=torch.long)
    scores = targets.extract(logits, labels, spec.targets, temperatures=spec.temperatures)
    codec = TargetCodec(spec)
    stored = codec.encode(as_arrays([scores]))
    for temperature in (2.0, 4.0):
        found = codec.targets(stored, temperature)
        p = (logits.double() / temperature).softmax(-1).numpy()
        wanted = np.take_along_axis(p, found.ids, -1)
        mass = wanted.sum(-1)
        off = np.abs(found.probs - wanted)
        # Of p^¼ at most half a level of 128, of which the smallest p keeps the least.
        assert (off <= wanted * (0.06 + 1e-3 / mass[..., None]) + 2e-3).all()
        np.testing.assert_allclose(found.probs.sum(-1) + found.tail, 1, atol=1e-6)
        np.testing.assert_allclose(found.tail, 1 - mass, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("frequent", [[300], [-1], [4, 4]])
def test_a_numbering_of_other_ids_is_refused(frequent: list[int]) -> None:
    with pytest.raises(ValueError, match="frequent id"):
        Numbering.of(frequent, 300)


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_what_was_lost_agrees_with_a_dense_reference(kind: str) -> None:
    logits = sharp(60, 8)
    scores = targets.extract(logits[None], torch.zeros(1, 8, dtype=torch.long), TargetSpec(kind, 7))
    kept = scores.targets(kind)
    stored = SparseTargets(kept.ids[0], kept.probs[0], kept.tail[0])
    found = compare(logits, stored, sampled=kind == "sampled")
    kl = variation = tail = error = 0.0
    for row in range(8):
        t = np.exp(logits[row].double().numpy())
        t /= t.sum()
        s = np.full(60, stored.tail[row].item() / 53)
        s[stored.ids[row]] = stored.probs[row]
        kl += sum(t * np.log(t / s)) if kind == "topk" else 0.0
        variation += sum(abs(t - s)) / 2
        tail += 1 - t[stored.ids[row]].sum()
        error += sum((t - s) ** 2) / sum((1 / 60 - t) ** 2)
    wanted = {"positions": 8, "kl": kl, "total_variation": variation, "tail": tail}
    for name, value in (wanted | {"gradient_error": error}).items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
