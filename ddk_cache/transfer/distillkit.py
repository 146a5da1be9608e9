"""DistillKit's packed log-probabilities (github.com/arcee-ai/DistillKit), for reading.

The k log-probabilities of a position, falling, are stored as differences: the first `exact_k` as
floats, the others as a polynomial of their place plus residuals, which are integers of some bits
with a scale for each bin. Ids are integers of ⌈log₂ d⌉ bits, the highest bit first. The settings
are those of the file compression_config.yaml beside the data.

Arithmetic here is float64, where DistillKit rounds to the types of the settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ddk_cache.errors import InputError
from ddk_cache.types import Array

CONFIG = "compression_config.yaml"

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Packing:
    """The settings of a folder."""

    d: int
    """Size of the vocabulary."""
    k: int
    """Entries of a position."""
    exact_k: int
    exact_dtype: str
    polynomial_terms: Sequence[int | str]
    """Powers of the place, or `sqrt` or `exp` of it."""
    term_dtype: str
    residual_bins: Sequence[Mapping[str, Any]]
    delta_encoding: bool
    normalize_t: bool
    """Whether places run from 0 to 1, and not from 0 to their number − 1."""

    def ids(self, data: Array) -> Array:
        """Return (N, k) ids of (N, bytes)."""
        return integers(data, math.ceil(math.log2(self.d)), self.k)

    def logprobs(self, data: Array) -> Array:
        """Return (N, k) float64 log-probabilities of (N, bytes). ValueError: bytes are missing."""
        rest = data

        def take(size: int) -> Array:
            nonlocal rest
            part, rest = rest[:, :size], rest[:, size:]
            if part.shape[1] != size:
                raise ValueError(f"{data.shape[1]} bytes of log-probabilities, more are needed")
            return part

        exact = floats(take(self.exact_k * BYTES[self.exact_dtype]), self.exact_dtype)
        count = self.k - self.exact_k
        others = np.zeros((len(data), count))
        if terms := self.polynomial_terms:
            factors = floats(take(len(terms) * BYTES[self.term_dtype]), self.term_dtype)
            places = np.linspace(0, 1, count) if self.normalize_t else np.arange(float(count))
            others += factors @ np.stack([_term(term, places) for term in terms])
        first = 0
        for part in self.residual_bins:
            scale = floats(take(BYTES[part["scale_dtype"]]), part["scale_dtype"])
            bits, number = part["element_bits"], part["num_elements"]
            steps = integers(take(-(-bits * number // 8)), bits, number)
            steps = 2 * steps - 1 if bits == 1 else steps - 2 ** (bits - 1)
            others[:, first : first + number] += steps * scale
            first += number
        values = np.concatenate([exact, others], -1)
        return values.cumsum(-1) if self.delta_encoding else values


def _term(term: int | str, places: Array) -> Array:
    values: Array = (
        {"sqrt": np.sqrt, "exp": np.exp}[term](places) if isinstance(term, str) else (places**term)
    )
    return values


def floats(data: Array, dtype: str) -> Array:
    """Return (N, n) float64 of (N, bytes), little-endian."""
    raw = np.ascontiguousarray(data)
    if dtype == "bfloat16":
        return (raw.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return raw.view(f"<f{BYTES[dtype]}").astype(np.float64)


def integers(data: Array, bits: int, count: int) -> Array:
    """Return (N, count) int64 of (N, bytes): `bits` each, the highest first."""
    found = np.unpackbits(data, axis=-1)[:, : bits * count]
    if found.shape[1] != bits * count:
        raise ValueError(f"{data.shape[1]} bytes for {count} integers of {bits} bits")
    weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    values: Array = found.reshape(len(data), count, bits) @ weights
    return values


@lru_cache(16)
def read_packing(folder: Path) -> Packing:
    """Return the settings of a folder. Raises InputError where they are missing or unknown."""
    path = folder / CONFIG
    try:
        config = yaml.safe_load(path.read_text())
        return Packing(
            d=int(config["d"]),
            k=int(config["k"]),
            exact_k=int(config["exact_k"]),
            exact_dtype=str(config.get("exact_dtype", "float32")),
            polynomial_terms=tuple(config.get("polynomial_terms") or ()),
            term_dtype=str(config.get("term_dtype", "float32")),
            residual_bins=tuple(config["residual_bins"]),
            delta_encoding=bool(config.get("delta_encoding", True)),
            normalize_t=bool(config.get("normalize_t", False)),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: got {error!r}, expected the settings that DistillKit writes beside its "
            "Parquet files. Copy the file there."
        ) from error
