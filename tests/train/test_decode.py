"""Stored integers decoded on a device, against the NumPy codec of the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_cache import SPLITS, MismatchError
from ddk_cache.build.scoring import as_arrays
from ddk_cache.build.targets import extract
from ddk_cache.read.cache import Cache
from ddk_cache.types import LABEL_KEPT
from ddk_train.data.decode import Dequantizer, look_up

CPU = torch.device("cpu")


KINDS = ["topk:1", "topk:8", "topk:300:1", "sampled:2", "sampled:24"]


@pytest.fixture(scope="module")
def caches(make_cache: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cache]:
    folder = tmp_path_factory.mktemp("caches")
    return {kind: make_cache(folder / f"{n}.zarr", targets=kind) for n, kind in enumerate(KINDS)}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), scale=st.floats(0.05, 20), likely=st.booleans())
def test_any_targets_are_those_of_the_numpy_codec(
    caches: dict[str, Cache], kind: str, seed: int, scale: float, likely: bool
) -> None:
    cache = caches[kind]
    name, V = cache.domains[seed % 3], cache.spec.vocab_size
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 16, V, generator=generator) * scale
    tokens = torch.randint(V, (3, 17), generator=generator)
    if likely:
        tokens[:, 1:] = logits.argmax(-1)
    codec = cache.codec(name)
    scores = as_arrays([extract(logits, tokens[:, 1:], cache.spec.targets)])
    stored = codec.encode(scores, tokens[:, 1:].numpy()) | {"tokens": tokens.numpy()}
    wanted = codec.targets(stored)
    decode = Dequantizer(cache, cache.domains, CPU)
    domain_B = torch.full((3,), cache.domains.index(name))
    arrays = {name: torch.from_numpy(array) for name, array in stored.items()}
    found = decode.targets(arrays, domain_B, decode.most(stored))
    assert stored["position_fields"][:, LABEL_KEPT].all() or not likely
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.probs, wanted.probs, rtol=2e-6)
    np.testing.assert_allclose(found.tail, wanted.tail, rtol=2e-6)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("targets", "temperature"),
    [("topk:8", 1.0), ("topk:8:0.5", 2.0), ("sampled:6", 1.0), ("sampled:300", 1.0)],
)
def test_rows_are_those_of_the_numpy_codec(
    split: str, targets: str, temperature: float, make_cache: Any, tmp_path: Path
) -> None:
    settings = {"temperatures": (2.0,)} if temperature != 1 else {}
    cache = make_cache(tmp_path / "mix.zarr", targets=targets, **settings)
    decode = Dequantizer(cache, cache.domains, CPU, temperature)
    for number, name in enumerate(cache.domains):
        row_B = cache.row_numbers(name, split)[-3:]
        found = decode.read(split, np.full(len(row_B), number), row_B)
        wanted = cache.read(name, split, row_B, temperature=temperature)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.loss_mask, wanted.loss_mask)
        np.testing.assert_array_equal(found.targets.ids, wanted.targets.ids)
        np.testing.assert_allclose(found.targets.probs, wanted.targets.probs, rtol=2e-6)
        np.testing.assert_allclose(found.targets.tail, wanted.targets.tail, rtol=2e-6)
        total = found.targets.probs.sum(-1) + found.targets.tail
        np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_a_temperature_without_targets_is_refused(cache: Cache) -> None:
    with pytest.raises(MismatchError, match="temperature"):
        Dequantizer(cache, cache.domains, CPU, 3.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_tables_take_codes_of_any_integer_type(dtype: torch.dtype) -> None:
    codes = torch.tensor([[3, 0], [1, 1]]).to(dtype)
    table = torch.tensor([10.0, 11.0, 12.0, 13.0])
    assert look_up(table, codes).tolist() == [[13.0, 10.0], [11.0, 11.0]]


def test_positions_and_mask_of_documents_apart_are_those_of_the_cache(packed_cache: Cache) -> None:
    decode = Dequantizer(packed_cache, packed_cache.domains, CPU)
    for number, name in enumerate(packed_cache.domains):
        row_B = packed_cache.row_numbers(name, "train")[-3:]
        found = decode.read("train", np.full(len(row_B), number), row_B)
        wanted = packed_cache.read(name, "train", row_B)
        assert wanted.segments is not None
        assert found.positions is not None
        np.testing.assert_array_equal(found.loss_mask, wanted.loss_mask)
        np.testing.assert_array_equal(found.targets.ids, wanted.targets.ids)
        for positions, segments in zip(found.positions, wanted.segments, strict=True):
            for segment in set(segments.tolist()):
                count = int((segments == segment).sum())
                assert positions[segments == segment].tolist() == list(range(count))
