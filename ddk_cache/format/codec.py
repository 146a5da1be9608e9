"""Sparse targets ↔ stored integers, each with its error bound.

Kept probabilities are rounded on an even grid of p^¼. Rounding on the grid of √p would cost the
least KL for its bits at temperature 1, and p^¼ does at temperature 2; p^¼ has no lower end that
matters, so one byte serves every teacher and adds a few ten-thousandths of a nat to the KL. Kept
entries are in order of id, because an order by value costs more bytes than all values together;
ids are numbered by frequency and stored as differences, one plane per byte. Single
log-probabilities (of the tail, of the true token) are 16-bit integers on an even grid of nats.

The price of the order is that the likeliest entry is not the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ddk_cache.errors import CorruptCacheError
from ddk_cache.format.spec import CacheSpec
from ddk_cache.types import Array, SparseTargets

ZERO = 2**16 - 1
"""The code of log 0, which is exact: an empty tail must not turn into a small one."""

POWER = 4
"""Probability = (code / levels) ^ POWER."""


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
        with np.errstate(invalid="ignore"):  # NaN is refused by the audit, not here
            codes = np.clip(np.rint(logprobs * np.float64(-1 / self.step)), 0, ZERO - 1)
            return np.where(np.isneginf(logprobs), ZERO, codes).astype(np.uint16)

    def decode(self, codes: Array) -> Array:
        """Return float32 log-probabilities of codes."""
        return self._logprobs[codes]

    def probs(self, codes: Array) -> Array:
        """Return float32 probabilities of codes."""
        return self._probs[codes]

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


@dataclass(frozen=True)
class ProbCodec:
    """p in [0, 1] is stored as round(levels · p^¼), and as at least 1 where p is not 0."""

    levels: int

    def error(self, probs: Array) -> Array:
        """Return the largest |stored − p| for each p: half a step of p^¼ upwards, or one level."""
        up = (np.float64(probs) ** (1 / POWER) + 0.5 / self.levels) ** POWER - probs
        bound: Array = np.maximum(up, self.levels**-POWER)
        return bound

    def encode(self, probs: Array) -> Array:
        """Return uint8 codes."""
        roots = np.sqrt(np.sqrt(probs))
        with np.errstate(invalid="ignore"):
            codes = np.clip(np.rint(self.levels * roots), 1, self.levels)
            return np.where(probs > 0, codes, 0).astype(np.uint8)

    @cached_property
    def values(self) -> Array:
        """(256) float32 probability of each code; codes above `levels` count as 1."""
        codes = np.minimum(np.arange(256), self.levels)
        return ((codes / self.levels) ** POWER).astype(np.float32)


@dataclass(frozen=True)
class Numbering:
    """Ids by frequency: the frequent ones in their order, then all others in theirs."""

    ids: Array
    """(V) uint32 id of each number."""
    numbers: Array
    """(V) uint32 number of each id."""

    @classmethod
    def of(cls, frequent: Sequence[int], vocab_size: int) -> Numbering:
        """Return the numbering of a vocabulary; ValueError where `frequent` is not of it."""
        first = np.array(frequent, np.int64)
        if len(first) and not 0 <= first.min() <= first.max() < vocab_size:
            raise ValueError("a frequent id is outside of the vocabulary")
        rest = np.ones(vocab_size, bool)
        rest[first] = False
        ids = np.concatenate([first, np.flatnonzero(rest)]).astype(np.uint32)
        if len(ids) != vocab_size:
            raise ValueError("a frequent id is listed twice")
        numbers = np.empty(vocab_size, np.uint32)
        numbers[ids] = np.arange(vocab_size, dtype=np.uint32)
        return cls(ids, numbers)


class TargetCodec:
    """The targets of one domain."""

    def __init__(self, spec: CacheSpec, frequent_ids: Sequence[int] = ()) -> None:
        self.spec = spec
        self.logprob = LogprobCodec(spec.logprob_step)
        self.prob = ProbCodec(spec.prob_levels)
        self.sampled = spec.targets.kind == "sampled"
        self.numbering = Numbering.of(frequent_ids, spec.vocab_size)

    def encode(self, scores: Mapping[str, Array]) -> dict[str, Array]:
        """Return the arrays to be stored, from those that `Scorer.score` returns.

        Entries are put in order of their numbers.
        """
        codes = self.prob.encode(np.exp(scores["logprobs"]))
        # Number and code are sorted as one integer, so that the code follows its id.
        keys = self.numbering.numbers[scores["ids"]].astype(np.uint64) << np.uint64(8) | codes
        keys.sort(axis=-1)
        numbers = (keys >> np.uint64(8)).astype("<u4")
        steps = np.diff(numbers, axis=-1, prepend=np.uint32(0))
        planes = steps.view(np.uint8).reshape(*steps.shape, 4)[..., : self.spec.id_bytes]
        stored = {
            "target_ids": np.ascontiguousarray(np.moveaxis(planes, -1, -3)),
            "target_probs": keys.astype(np.uint8),
        }
        rest = ("tail_logprob", "label_logprob", "tempered_tail_logprob")
        return stored | {
            name: self.logprob.encode(scores[name]) for name in rest if name in self.spec.arrays
        }

    def targets(
        self, stored: Mapping[str, Array], temperature: float = 1.0
    ) -> SparseTargets[Array]:
        """Return (R, S, K) targets of stored rows, scaled so that entries and tail sum to one.

        Raises:
            MismatchError: the cache does not store the tail at this temperature.
            CorruptCacheError: an id is outside of the vocabulary.
        """
        codes = stored["target_probs"]
        if temperature != 1:
            return self._tempered(stored, codes, temperature)
        probs, tail = self.prob.values[codes], self.logprob.probs(stored["tail_logprob"])
        scale = (1 / (probs.sum(-1, dtype=np.float64) + tail)).astype(np.float32)
        probs, tail = probs * scale[..., None], tail * scale
        if self.sampled:
            drawn = codes == 0
            count = drawn.sum(-1)
            share = np.where(count > 0, tail / np.maximum(count, 1), 0.0).astype(np.float32)
            probs = np.where(drawn, share[..., None], probs)
            tail = np.where(count > 0, 0, tail)
        return SparseTargets(self.ids(stored["target_ids"]), probs, tail)

    def _tempered(
        self, stored: Mapping[str, Array], codes: Array, temperature: float
    ) -> SparseTargets[Array]:
        """Return targets at another temperature: t^(1/T), which fills 1 − tail."""
        place = self.spec.temperature_place(temperature)
        tail = self.logprob.probs(stored["tempered_tail_logprob"][..., place, :])
        weights = (self.prob.values ** (1 / temperature))[codes]
        scale = ((1 - tail) / weights.sum(-1, dtype=np.float64)).astype(np.float32)
        return SparseTargets(self.ids(stored["target_ids"]), weights * scale[..., None], tail)

    def ids(self, planes: Array) -> Array:
        """Return (R, S, K) int64 ids of (R, bytes, S, K) planes."""
        steps = planes[:, 0].astype(np.uint32)
        for place in range(1, planes.shape[1]):
            steps |= planes[:, place].astype(np.uint32) << np.uint32(8 * place)
        numbers = steps.cumsum(-1, dtype=np.uint32)
        if numbers.size and numbers.max() >= self.spec.vocab_size:
            raise CorruptCacheError("a stored id is outside of the vocabulary.")
        ids: Array = self.numbering.ids[numbers].astype(np.int64)
        return ids

    def attributes(self, name: str) -> dict[str, Any]:
        """Return what a plain Zarr reader needs to decode an array."""
        if name.endswith("_logprob"):
            beside = {"temperatures": list(self.spec.temperatures)} if "tempered" in name else {}
            return self.logprob.attributes() | beside
        if name == "target_probs":
            zero = "an equal share of the tail" if self.sampled else "0"
            return {"levels": self.prob.levels, "power": POWER, "code_0": zero}
        if name == "target_ids":
            return {
                "planes": "bytes, lowest first, of the differences of ascending numbers",
                "numbers": "the frequent_ids of the domain's group, then all other ids in order",
            }
        return {}
