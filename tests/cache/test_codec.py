"""Sparse targets ↔ stored integers: what comes back is within the stated errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ddk_cache.build import targets
from ddk_cache.build.scoring import as_arrays
from ddk_cache.errors import CorruptCacheError
from ddk_cache.format.codec import REST, ZERO, LogprobCodec, Numbering, ProbCodec, TargetCodec
from ddk_cache.format.spec import KEPT_MASS, CacheSpec, TargetSpec
from ddk_cache.types import DRAWN_PROB, EXACT_COUNT, SparseTargets
from tests.helpers import sharp

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


# --- sparse targets -------------------------------------------------------------------------------


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


def in_order(targets: SparseTargets[Any], *others: np.ndarray) -> list[np.ndarray]:
    """Return ids, probabilities and others of one width, in order of id; padding comes last."""
    ids = np.asarray(targets.ids)
    order = np.argsort(np.where(ids < 0, 2**31, ids), -1)
    parts = [ids, np.asarray(targets.probs), *others]
    return [np.take_along_axis(part, order, -1) for part in parts]


def bounds(codec: TargetCodec, scores: targets.Scores, shared: np.ndarray) -> np.ndarray:
    """Return (R, S, K): how far rounding may move each entry by itself."""
    ids, exact = scores.ids.numpy(), scores.logprobs.exp().numpy()
    own = np.where(exact > 0, codec.prob.error(exact), 0.0)
    drawn = (ids >= 0) & (exact == 0)
    count = np.maximum(drawn.sum(-1, keepdims=True), 1)
    share = scores.tail_logprob.exp().numpy()[..., None] / count
    apart = codec.drawn.error * share + 2.0**-15 / codec.drawn.size
    return np.where(
        drawn, np.where(shared[..., None], own.sum(-1, keepdims=True) / count, apart), own
    )


def check(codec: TargetCodec, scores: targets.Scores, labels: torch.Tensor) -> None:
    """Store scores, read them back, and compare."""
    kind, rows = codec.spec.targets.kind, len(labels)
    stored = codec.encode(as_arrays([scores]), labels.numpy())
    for name, array in stored.items():
        assert array.shape == (rows, *codec.spec.arrays[name].inner)
        assert array.dtype == codec.spec.arrays[name].dtype
    tokens = np.concatenate([labels[:, :1], labels], 1)
    found, wanted = codec.targets(stored | {"tokens": tokens}), scores.targets(kind)
    K = found.ids.shape[-1]
    np.testing.assert_allclose(found.probs.sum(-1, dtype=np.float64) + found.tail, 1, atol=2e-6)
    assert ((found.probs == 0) | (found.ids >= 0)).all()
    shared = np.zeros(labels.shape, bool)
    if kind == "sampled":
        shared = stored["position_fields"][:, DRAWN_PROB] == REST
    ids, probs, own = in_order(wanted, bounds(codec, scores, shared))
    found_ids, found_probs = in_order(found)
    np.testing.assert_array_equal(ids[..., :K], found_ids)
    assert (ids[..., K:] < 0).all()
    # What the others leave of one is off by the rounding of all others; the rest by their own, and
    # by the scale where what the others leave would be less than the largest of them.
    total = own.sum(-1, keepdims=True) + found.tail[..., None] * codec.logprob.error
    off = np.abs(found_probs - probs[..., :K])
    alone = off <= own[..., :K] + probs[..., :K] * total + 2e-6
    assert (alone.sum(-1) >= K - 1).all()
    assert (off <= total + 2e-6).all()
    tail_error = wanted.tail.numpy() * (total[..., 0] + codec.logprob.error)
    assert (np.abs(found.tail - wanted.tail.numpy()) <= tail_error + 1e-6).all()


@st.composite
def cases(draw: st.DrawFn) -> tuple[TargetCodec, torch.Tensor, torch.Tensor]:
    """Return a codec, (2, 6, V) logits, and labels, of which many are kept."""
    vocab = draw(st.sampled_from([6, 255, 300, 70_000]))
    kind = draw(st.sampled_from(["topk", "sampled"]))
    size = draw(st.integers(2 if kind == "sampled" else 1, 6))
    frequent = draw(st.lists(st.integers(0, vocab - 1), max_size=20, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logits = torch.randn(2, 6, vocab, generator=generator) * draw(st.floats(0.1, 20))
    ranks = torch.randint(0, size, (2, 6, 1), generator=generator)
    labels = logits.topk(size).indices.gather(-1, ranks)[..., 0]
    unlikely = torch.rand(2, 6, generator=generator) < 0.4
    labels = labels.where(~unlikely, torch.randint(vocab, (2, 6), generator=generator))
    mass = draw(st.sampled_from([KEPT_MASS, 0.8, 1.0])) if kind == "topk" else KEPT_MASS
    spec = spec_of(vocab_size=vocab, targets=TargetSpec(kind, size, mass))
    return TargetCodec(spec, frequent), logits, labels


@settings(deadline=None)
@given(cases())
def test_stored_targets_come_back(case: tuple[TargetCodec, torch.Tensor, torch.Tensor]) -> None:
    codec, logits, labels = case
    check(codec, targets.extract(logits, labels, codec.spec.targets), labels)


def scored(probs: list[float], label: int, targets_text: str) -> tuple[TargetCodec, Any, Any]:
    """Return codec, scores and labels of six positions with one distribution."""
    logits = torch.tensor(probs).log().expand(1, 6, -1)
    labels = torch.full((1, 6), label)
    spec = spec_of(vocab_size=len(probs), targets=TargetSpec.parse(targets_text))
    return TargetCodec(spec), targets.extract(logits, labels, spec.targets), labels


SURE = [1.0] + 29 * [0.0]
FEW = [0.5, 0.3, 0.2] + 27 * [0.0]
NEARLY = [0.6, 0.4 - 2e-7, 2e-7] + 27 * [0.0]
"""Of which the last is not worth an entry."""
LEVEL = 10 * [0.0905] + 20 * [0.00475]
"""The exact entries are rounded the same way, and the drawn ones share the sum of it."""


KINDS = ["topk:1", "topk:12", "topk:30:1", "sampled:2", "sampled:12"]


@pytest.mark.parametrize("targets_text", KINDS)
@pytest.mark.parametrize("label", [0, 2, 29])
@pytest.mark.parametrize("probs", [SURE, FEW, NEARLY, LEVEL])
def test_special_positions_come_back(probs: list[float], label: int, targets_text: str) -> None:
    codec, scores, labels = scored(probs, label, targets_text)
    check(codec, scores, labels)


def test_a_true_token_that_is_exact_is_left_out_and_put_back() -> None:
    codec, scores, labels = scored(FEW, 1, "sampled:12")
    stored = codec.encode(as_arrays([scores]), labels.numpy())
    assert stored["position_fields"][0, :, 0].tolist()[:3] == [1, 2, 0]
    assert (stored["position_fields"] == stored["position_fields"][..., :1]).all()
    found = codec.targets(stored | {"tokens": np.ones((1, 7), int)})
    np.testing.assert_array_equal(found.ids[0, 0], [0, 2, 1])
    np.testing.assert_allclose(found.probs[0, 0, 2], 0.3, rtol=codec.logprob.error + 1e-6)


def test_one_entry_costs_no_code() -> None:
    codec, scores, labels = scored(SURE, 3, "sampled:12")
    stored = codec.encode(as_arrays([scores]), labels.numpy())
    assert (stored["position_fields"][:, EXACT_COUNT] == 1).all()
    assert not stored["target_probs"].any()
    found = codec.targets(stored | {"tokens": np.full((1, 7), 3)})
    assert found.ids.shape == (1, 6, 1)
    assert (found.probs == 1).all()


@pytest.mark.parametrize("name", ["position_fields", "target_ids"])
def test_stored_entries_that_cannot_be_are_refused(name: str) -> None:
    codec, scores, labels = scored(FEW, 1, "topk:12")
    stored = codec.encode(as_arrays([scores]), labels.numpy())
    stored[name][:] = 200
    with pytest.raises(CorruptCacheError, match=r"entries in a row|outside of the vocabulary"):
        codec.targets(stored | {"tokens": np.ones((1, 7), int)})


def test_targets_at_a_declared_temperature_are_those_of_a_softened_teacher() -> None:
    logits = sharp(300, 12).reshape(2, 6, 300)
    spec = spec_of(targets=TargetSpec("topk", 20), temperatures=(2.0, 4.0))
    labels = torch.zeros(2, 6, dtype=torch.long)
    scores = targets.extract(logits, labels, spec.targets, temperatures=spec.temperatures)
    codec = TargetCodec(spec)
    stored = codec.encode(as_arrays([scores]), labels.numpy())
    stored["tokens"] = np.zeros((2, 7), int)
    assert (scores.ids < 0).any()  # some positions need fewer entries
    for temperature in (2.0, 4.0):
        found = codec.targets(stored, temperature)
        kept = found.ids >= 0
        p = (logits.double() / temperature).softmax(-1).numpy()
        wanted = np.take_along_axis(p, np.maximum(found.ids, 0), -1) * kept
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
