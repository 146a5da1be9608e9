"""Caches of every format, kept: they must open, verify and read the same for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddk_cache import Cache, open_cache
from ddk_cache.inspect.verify import verify

DATA = Path(__file__).parents[1] / "data"


def opened(name: str, fingerprint: str) -> Cache:
    cache = open_cache(DATA / name)
    assert not verify(cache, lambda _: None)
    assert cache.spec.fingerprint == fingerprint
    return cache


TOKENS = [87, 77, 79, 221, 83, 79, 68, 79, 87, 83, 83, 68, 69, 83, 79, 79, 79]


def test_version_3_topk_with_a_temperature() -> None:
    cache = opened("v3.zarr", "d5d86151e09cf6e04b398ed2458fc5a6")
    rows = cache.read("some", "train", cache.row_numbers("some", "train"))
    probs = [0.03932416811585426, 0.22118550539016724, 0.04215723276138306, 0.04215723276138306]
    np.testing.assert_array_equal(rows.tokens[0], TOKENS)
    np.testing.assert_array_equal(rows.targets.ids[0, 0], [89, 101, 217, 280])
    np.testing.assert_allclose(rows.targets.probs[0, 0], probs, rtol=1e-6)
    np.testing.assert_allclose(rows.targets.tail[0, 0], 0.6551758646965027, rtol=1e-6)
    assert rows.label_logprob.sum(dtype=np.float64) == pytest.approx(-1909.5068359375, rel=1e-9)
    soft = cache.read("some", "train", [0], temperature=2.0).targets
    probs = [0.01855343207716942, 0.04400204122066498, 0.01921013928949833, 0.01921013928949833]
    np.testing.assert_allclose(soft.probs[0, 0], probs, rtol=1e-6)
    np.testing.assert_allclose(soft.tail[0, 0], 0.899024248123169, rtol=1e-6)


def test_version_3_sampled_under_lz4() -> None:
    cache = opened("v3-sampled.zarr", "2c9c558bebe2d225de1415c937c6c76f")
    rows = cache.read("some", "train", cache.row_numbers("some", "train"))
    np.testing.assert_array_equal(rows.tokens[0], TOKENS)
    ids = [[101, 89, -1, -1], [269, 115, 189, 239]]
    np.testing.assert_array_equal(rows.targets.ids[0, :2], ids)
    shared = 0.2621929943561554
    probs = [
        [0.7897759079933167, 0.21022410690784454, 0.0, 0.0],
        [0.21342098712921143, shared, shared, shared],
    ]
    np.testing.assert_allclose(rows.targets.probs[0, :2], probs, rtol=1e-6)
    assert (rows.targets.tail == 0).all()
    assert rows.label_logprob.sum(dtype=np.float64) == pytest.approx(-2874.2958984375, rel=1e-9)
