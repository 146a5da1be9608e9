"""DistillKit's packed log-probabilities, packed here by their definition in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from ddk_cache import InputError, open_cache
from ddk_cache.build.config import BuildConfig
from ddk_cache.transfer.distillkit import read_packing
from ddk_cache.transfer.imported import import_cache
from ddk_cache.types import Array

V, EXACT, TERMS = 257, 3, [0, 1, "sqrt"]
BINS = [
    {"scale_dtype": "float16", "element_bits": 7, "num_elements": 4},
    {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 3},
]
SETTINGS: dict[str, Any] = {
    "d": V, "k": 12, "exact_k": EXACT, "exact_dtype": "float32", "polynomial_terms": TERMS,
    "term_dtype": "float32", "residual_bins": BINS, "delta_encoding": True,
    "error_diffusion": False, "normalize_t": False,
}  # fmt: skip


def bits(values: list[int], width: int) -> bytes:
    """Write integers one after another, the highest bit first."""
    text = "".join(format(value, f"0{width}b") for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def pack(logprobs: Array) -> tuple[bytes, Array]:
    """Return the bytes of the falling (12) values of a position, and what they must decode to."""
    values = np.diff(logprobs, prepend=0.0)
    exact = values[:EXACT].astype("<f4")
    places = np.arange(9.0)
    matrix = np.stack([places**0, places, np.sqrt(places)], -1)
    factors = np.linalg.lstsq(matrix, values[EXACT:], rcond=None)[0].astype("<f4")
    fit = matrix @ factors.astype(np.float64)
    residual, decoded = values[EXACT:] - fit, fit.copy()
    scale = np.float16(np.abs(residual[:4]).max() / 64)
    steps = np.clip(np.rint(residual[:4] / float(scale)), -64, 63).astype(int)
    decoded[:4] += steps * float(scale)
    half = np.float32(0.0078125)  # a bfloat16
    signs = (residual[4:7] > 0).astype(int)
    decoded[4:7] += (2 * signs - 1) * float(half)
    data = exact.tobytes() + factors.tobytes() + scale.tobytes() + bits((steps + 64).tolist(), 7)
    data += (half.view(np.uint32) >> 16).astype("<u2").tobytes() + bits(signs.tolist(), 1)
    return data, np.concatenate([exact, decoded]).cumsum()


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, dict[int, Array]]:
    """A folder as DistillKit writes it, and what each last token's distribution must be."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(V, V)) * 2
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-table, -1)[:, :12]
    packed = [pack(table[i, order[i]]) for i in range(V)]
    records = []
    for _ in range(8):
        tokens = generator.integers(V, size=40).tolist()
        records.append(
            {
                "input_ids": tokens,
                "compressed_logprobs": [list(packed[t][0]) for t in tokens[:-1]],
                "bytepacked_indices": [list(bits(order[t].tolist(), 9)) for t in tokens[:-1]],
            }
        )
    (tmp_path / "data").mkdir()
    (tmp_path / "data/compression_config.yaml").write_text(yaml.safe_dump(SETTINGS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "data/0.parquet")
    truth = np.full((V, V), -np.inf)
    for i in range(V):
        truth[i, order[i]] = packed[i][1]
    return tmp_path / "data", dict(enumerate(truth))


def test_values_are_those_that_were_packed(folder: tuple[Path, dict[int, Array]]) -> None:
    packing = read_packing(folder[0])
    table = pyarrow.parquet.read_table(folder[0] / "0.parquet").to_pylist()
    for record in table:
        ids = packing.ids(np.array(record["bytepacked_indices"], np.uint8))
        found = packing.logprobs(np.array(record["compressed_logprobs"], np.uint8))
        for token, some, values in zip(record["input_ids"], ids, found, strict=False):
            np.testing.assert_allclose(values, folder[1][token][some], rtol=0, atol=1e-6)


def test_an_imported_cache_has_these_values(
    folder: tuple[Path, dict[int, Array]], tokenizer: Any, tmp_path: Path
) -> None:
    config = BuildConfig(seq_len=16, chunk_rows=2, shard_rows=4, holdout=0.0)
    import_cache(folder[0], tmp_path / "mix.zarr", tokenizer, config)
    cache = open_cache(tmp_path / "mix.zarr")
    assert cache.spec.teacher == {"class": "imported", "format": "bytepacked_indices"}
    assert float(cache.manifest.root.provenance["most_mass"]) > 0.5
    rows, codec = cache["data"].train[:], cache.codec("data")
    for row, s in zip(*np.nonzero(rows.loss_mask), strict=True):
        ids, probs = rows.targets.ids[row, s], rows.targets.probs[row, s]
        kept = ids >= 0
        given = np.exp(folder[1][int(rows.tokens[row, s])][ids[kept]])
        bound = codec.prob.error(given).sum()
        assert np.abs(probs[kept] - given).max() <= bound


def test_settings_that_are_missing_are_said(folder: tuple[Path, dict[int, Array]]) -> None:
    (folder[0] / "compression_config.yaml").unlink()
    read_packing.cache_clear()
    with pytest.raises(InputError, match=r"compression_config\.yaml: got FileNotFoundError"):
        read_packing(folder[0])
    (folder[0] / "compression_config.yaml").write_text("d: 5")
    with pytest.raises(InputError, match=r"got KeyError\('k'\)"):
        read_packing(folder[0])
