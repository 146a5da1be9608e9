"""Caches of every format, kept: they must open, verify and read the same for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddk_cache import Cache, open_cache
from ddk_cache.verify import verify

DATA = Path(__file__).parents[1] / "data"


def opened(name: str, fingerprint: str) -> Cache:
    cache = open_cache(DATA / name)
    assert not verify(cache, lambda _: None)
    assert cache.spec.fingerprint == fingerprint
    return cache


TOKENS_2 = [87, 77, 79, 221, 83, 79, 68, 79, 87, 83, 83, 68, 69, 83, 79, 79, 79]
LABELS_2 = -1909.5068359375


def test_version_2_topk_with_a_temperature() -> None:
    cache = opened("v2.zarr", "69831f8a1670f6315b024c4725a9fe86")
    rows = cache.read("some", "train", cache.row_numbers("some", "train"))
    probs = [0.0392371229827404, 0.22290942072868347, 0.042063917964696884, 0.042063917964696884]
    np.testing.assert_array_equal(rows.tokens[0], TOKENS_2)
    np.testing.assert_array_equal(rows.targets.ids[0, 0], [89, 101, 217, 280])
    np.testing.assert_allclose(rows.targets.probs[0, 0], probs, rtol=1e-6)
    np.testing.assert_allclose(rows.targets.tail[0, 0], 0.6537256240844727, rtol=1e-6)
    assert rows.label_logprob.sum(dtype=np.float64) == pytest.approx(LABELS_2, rel=1e-9)
    soft = cache.read("some", "train", [0], temperature=2.0).targets
    probs = [0.01851307600736618, 0.04412596672773361, 0.01916835643351078, 0.01916835643351078]
    np.testing.assert_allclose(soft.probs[0, 0], probs, rtol=1e-6)
    np.testing.assert_allclose(soft.tail[0, 0], 0.899024248123169, rtol=1e-6)


def test_version_2_sampled_under_lz4() -> None:
    cache = opened("v2-sampled.zarr", "a0acd2fec1e1944192740965f2e1836f")
    rows = cache.read("some", "train", cache.row_numbers("some", "train"))
    drawn = 0.25897276401519775
    np.testing.assert_array_equal(rows.tokens[0], TOKENS_2)
    np.testing.assert_array_equal(rows.targets.ids[0, 0], [34, 101, 103, 222])
    probs = [drawn, 0.22308167815208435, drawn, drawn]
    np.testing.assert_allclose(rows.targets.probs[0, 0], probs, rtol=1e-6)
    assert (rows.targets.tail == 0).all()
    assert rows.label_logprob.sum(dtype=np.float64) == pytest.approx(LABELS_2, rel=1e-9)
