"""Sparse targets ↔ stored integers: what comes back is within the stated errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ddk_cache.build import targets
from ddk_cache.build.scoring import as_arrays
from ddk_cache.format.codec import ZERO, LogprobCodec, Numbering, ProbCodec, TargetCodec
from ddk_cache.format.spec import CacheSpec, TargetSpec

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
    """Return logits from flat to nearly one-hot."""
    generator = torch.Generator().manual_seed(vocab)
    scale = torch.linspace(0.1, 8, positions)[:, None]
    return torch.randn(positions, vocab, generator=generator) * scale


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
