"""Log-probabilities ↔ 16-bit integers on an even grid of nats.

An even grid in log space gives every probability the same relative error, whatever its size, and
neighbouring integers that general-purpose compressors take well. The trade-off against a float16:
a little less range (64 nats, below which a probability is e⁻⁶⁴), and an error bound that is one
number for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ddk_cache.schema import Array, SparseTargets

ZERO = 2**16 - 1
"""The code of probability zero, which is exact: an empty tail must not turn into a small one."""


@dataclass(frozen=True)
class LogprobCodec:
    """x ≤ 0 nats is stored as round(−x / step), capped one below `ZERO`."""

    step: float = 2.0**-10
    """Nats between neighbours."""

    @property
    def error(self) -> float:
        """Return the largest error in nats of any x above `floor`."""
        return self.step / 2

    @property
    def floor(self) -> float:
        """Return the lowest finite value; anything finite below is stored as this."""
        return -(ZERO - 1) * self.step

    def encode(self, logprobs: Array) -> Array:
        """Return uint16 codes of log-probabilities (nats; rounding above 0 counts as 0)."""
        codes = np.clip(np.rint(-logprobs.astype(np.float64) / self.step), 0, ZERO - 1)
        with np.errstate(invalid="ignore"):  # NaN is refused by the audit, not here
            return np.where(np.isneginf(logprobs), ZERO, codes).astype(np.uint16)

    def decode(self, codes: Array) -> Array:
        """Return float32 log-probabilities of codes."""
        return self._logprobs[codes]

    def probs(self, codes: Array) -> Array:
        """Return float32 probabilities of codes."""
        return self._probs[codes]

    def targets(self, ids: Array, logprobs: Array, tail: Array) -> SparseTargets[Array]:
        """Return targets of stored arrays, scaled so that kept entries and tail sum to one.

        The scaling takes out what the rounding of each entry added to the sum: at most a factor
        of exp(±error).
        """
        probs, rest = self.probs(logprobs), self.probs(tail)
        total = probs.sum(-1, dtype=np.float64) + rest
        scale = (1 / total).astype(np.float32)
        return SparseTargets(ids.astype(np.int64), probs * scale[..., None], rest * scale)

    def attributes(self) -> dict[str, Any]:
        """Return what a plain Zarr reader needs to decode an array."""
        return {"scale": -self.step, "unit": "nat", "minus_infinity": ZERO}

    @cached_property
    def _logprobs(self) -> Array:
        values = -self.step * np.arange(ZERO + 1, dtype=np.float64)
        values[ZERO] = -np.inf
        return values.astype(np.float32)

    @cached_property
    def _probs(self) -> Array:
        values: Array = np.exp(self._logprobs)
        return values
