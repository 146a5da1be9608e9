"""Sparse targets ↔ stored integers, each with its error bound.

Exact probabilities are rounded on an even grid of p^¼. Rounding on the grid of √p would cost the
least KL for its bits at temperature 1, and p^¼ does at temperature 2; p^¼ has no lower end that
matters, so one byte serves every teacher and adds a few ten-thousandths of a nat to the KL. Drawn
entries share one probability, which has one code for each position. Entries are in order of id,
because an order by value costs more bytes than all values together; ids are numbered by frequency
and stored as differences, one plane per byte. Single log-probabilities (of the tail, of the true
token) are 16-bit integers on an even grid of nats.

What a reader can compute is not stored: not the true token, where it is an exact entry, and not
one probability of each position, which is what the others leave of one. That one is the largest,
so it absorbs the rounding of all others.

Entries of a row follow one another, so a position with few of them costs few bytes. The price: a
position is found by adding up the counts before it, and the likeliest entry is not the first one.

Shape letters: R rows, S positions, K entries of a position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ddk_cache.errors import CorruptCacheError
from ddk_cache.format.spec import CacheSpec
from ddk_cache.types import (
    DRAWN_COUNT,
    DRAWN_PROB,
    EXACT_COUNT,
    LABEL_KEPT,
    Array,
    SparseTargets,
)

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


REST = 255
"""The code of drawn entries that share what the exact entries leave of one."""


@dataclass(frozen=True)
class DrawnCodec:
    """The probability that each drawn entry stands for, at most 1 / size: 16 steps per octave.

    A step is 4.4 %. The mass that rounding moves goes to the likeliest entry.
    """

    size: int

    @property
    def error(self) -> float:
        """Return the largest relative error of a probability above 2⁻¹⁵ / size."""
        return float(2 ** (1 / 32) - 1)

    def encode(self, probs: Array) -> Array:
        """Return uint8 codes."""
        octaves = -np.log2(np.maximum(probs * self.size, 2.0**-32))
        codes: Array = np.clip(np.rint(16 * octaves), 0, REST - 1)
        return codes.astype(np.uint8)

    @cached_property
    def values(self) -> Array:
        """(256) float64 probability of each code."""
        values: Array = np.exp2(-np.arange(256) / 16) / self.size
        return values


class Entries(NamedTuple):
    """Where the stored entries of some rows lie."""

    place: Array
    """(R, S, K) index into the entries of the row."""
    inside: Array
    """(R, S, K) whether there is such an entry; the others are padding."""
    exact: Array
    """(R, S, 1) how many entries of a position are exact; they come first."""
    at_label: Array
    """(R, S, K) the place behind the entries, where the true token is an exact one left out."""


class TargetCodec:
    """The targets of one domain."""

    def __init__(self, spec: CacheSpec, frequent_ids: Sequence[int] = ()) -> None:
        self.spec = spec
        self.logprob = LogprobCodec(spec.logprob_step)
        self.prob = ProbCodec(spec.prob_levels)
        self.drawn = DrawnCodec(spec.targets.size)
        self.sampled = spec.targets.kind == "sampled"
        self.numbering = Numbering.of(frequent_ids, spec.vocab_size)

    def encode(self, scores: Mapping[str, Array], labels: Array) -> dict[str, Array]:
        """Return the arrays to store, from those that `Scorer.score` returns; `labels` is (R, S).

        The exact entries of a position come first, then the drawn ones, each group in order of its
        numbers. The true token is left out where it is an exact entry: its id and its
        log-probability are stored anyway. The entries of a row follow one another.
        """
        ids, probs = scores["ids"], np.exp(scores["logprobs"])
        valid = ids >= 0
        exact = valid & (probs != 0)  # NaN is exact: the audit refuses it by name
        label = exact & (ids == labels[..., None])
        stored = valid & ~label
        codes = self.prob.encode(probs)
        drawn = (stored & ~exact).sum(-1)
        tail = np.exp(scores["tail_logprob"].astype(np.float64))
        # Code 0, of what the others leave of one, is that of the likeliest exact entry; but where
        # the drawn entries have more mass together, they share what is left.
        likeliest = np.argmax(exact & (~label | (exact.sum(-1) == 1)[..., None]), -1)[..., None]
        largest = np.take_along_axis(probs, likeliest, -1)[..., 0]
        rest_is_drawn = (drawn > 0) & (tail >= largest)
        code = np.where(rest_is_drawn[..., None], np.take_along_axis(codes, likeliest, -1), 0)
        np.put_along_axis(codes, likeliest, code.astype(np.uint8), -1)
        # Group, number and code are sorted as one integer, so no second pass moves the codes.
        keys = self.numbering.numbers[np.maximum(ids, 0)].astype(np.uint64) << np.uint64(8) | codes
        keys |= np.where(exact, np.uint64(0), np.uint64(1) << np.uint64(40))
        keys = np.where(stored, keys, np.uint64(2**64 - 1))
        keys.sort(axis=-1)
        count, first = stored.sum(-1), (exact & ~label).sum(-1)
        order = np.arange(ids.shape[-1])
        kept, ahead = order < count[..., None], order < first[..., None]
        numbers = (keys >> np.uint64(8)).astype("<u4")
        steps = np.diff(numbers, axis=-1, prepend=np.uint32(0))
        steps = np.where(order == first[..., None], numbers, steps)  # the second group starts anew
        row = self._joined(steps, kept).view(np.uint8).reshape(len(ids), -1, 4)
        fields = [label.any(-1), first]
        if self.sampled:
            share = self.drawn.encode(np.where(drawn > 0, tail / np.maximum(drawn, 1), 1))
            fields += [drawn, np.where(rest_is_drawn, REST, share)]
        small = self.spec.arrays["position_fields"].dtype
        arrays = {
            "position_fields": np.stack(fields, 1).astype(small),
            "target_ids": np.ascontiguousarray(np.moveaxis(row[..., : self.spec.id_bytes], -1, 1)),
            "target_probs": self._joined(keys.astype(np.uint8), ahead),
        }
        return arrays | {
            name: self.logprob.encode(scores[name])
            for name in ("tail_logprob", "label_logprob", "tempered_tail_logprob")
            if name in self.spec.arrays
        }

    def _joined(self, values: Array, kept: Array) -> Array:
        """Return (R, S · size): the kept ones of (R, S, K) values, row by row, and zeros after."""
        R, S, _ = values.shape
        joined = np.zeros((R, S * self.spec.targets.size), values.dtype)
        inside = np.arange(joined.shape[1]) < kept.sum((1, 2))[:, None]
        joined[inside] = values[kept]
        return joined

    def targets(
        self, stored: Mapping[str, Array], temperature: float = 1.0
    ) -> SparseTargets[Array]:
        """Return (R, S, K) targets of stored rows; entries and tail sum to one.

        `stored` holds the tokens too. K is the most entries of any of these positions. A position
        with fewer is padded with the id −1 and probability 0.

        Raises:
            MismatchError: the cache does not store the tail at this temperature.
            CorruptCacheError: an id is outside of the vocabulary, or a row counts more entries
                than it has room for.
        """
        entries = self._entries(stored)
        ids = self._ids(stored["target_ids"], entries)
        probs, tail = self._probs(stored, entries)
        ids = np.where(entries.at_label, stored["tokens"][:, 1:, None].astype(np.int64), ids)
        if temperature != 1:
            place = self.spec.temperature_place(temperature)
            tail = self.logprob.probs(stored["tempered_tail_logprob"][..., place, :])
            weights = probs ** np.float32(1 / temperature)
            scale = (1 - tail) / weights.sum(-1, dtype=np.float64)
            probs = weights * scale[..., None].astype(np.float32)
        return SparseTargets(ids, probs, tail)

    def _entries(self, stored: Mapping[str, Array]) -> Entries:
        fields = np.moveaxis(stored["position_fields"], 1, 0)
        exact = fields[EXACT_COUNT].astype(np.int64)
        count = exact + fields[DRAWN_COUNT] if self.sampled else exact
        width = stored["target_probs"].shape[1]
        ends = count.cumsum(-1)
        if len(ends) and ends[:, -1].max() > width:
            raise CorruptCacheError(
                f"position_fields: got {ends[:, -1].max():,} entries in a row, "
                f"expected at most {width:,}."
            )
        label = fields[LABEL_KEPT].astype(bool)
        order = np.arange((count + label).max(initial=1))
        inside = order < count[..., None]
        place = np.where(inside, (ends - count)[..., None] + order, 0)
        at_label = label[..., None] & (order == count[..., None])
        return Entries(place, inside, exact[..., None], at_label)

    def _ids(self, planes: Array, entries: Entries) -> Array:
        """Return (R, S, K) ids of (R, bytes, S · size) planes, −1 where there is no entry."""
        steps = planes[:, 0].astype(np.uint32)
        for place in range(1, planes.shape[1]):
            steps |= planes[:, place].astype(np.uint32) << np.uint32(8 * place)
        steps = _take(steps, entries.place) * entries.inside
        sums = steps.cumsum(-1, dtype=np.int64)
        order = np.arange(sums.shape[-1])
        ahead = np.take_along_axis(sums, np.maximum(entries.exact - 1, 0), -1)
        numbers = sums - np.where((order >= entries.exact) & (entries.exact > 0), ahead, 0)
        if numbers.size and (numbers * entries.inside).max() >= self.spec.vocab_size:
            raise CorruptCacheError("a stored id is outside of the vocabulary.")
        ids = self.numbering.ids[numbers * entries.inside].astype(np.int64)
        return np.where(entries.inside, ids, -1)

    def _probs(self, stored: Mapping[str, Array], entries: Entries) -> tuple[Array, Array]:
        """Return (R, S, K) probabilities at temperature 1 and the (R, S) tail, float32."""
        order = np.arange(entries.inside.shape[-1])
        ahead = order < entries.exact
        begins = entries.exact.cumsum(1) - entries.exact
        codes = _take(stored["target_probs"], np.where(ahead, begins + order, 0)) * ahead
        probs = self.prob.values[codes].astype(np.float64)
        at_label = entries.at_label
        # Code 0 is what the others leave of one; the true token is where no other is exact.
        implied = np.where(entries.exact > 0, ahead & (codes == 0), at_label)
        shared = np.zeros(entries.exact.shape, bool)
        tail = np.zeros(entries.exact.shape)
        if self.sampled:
            drawn_code = stored["position_fields"][:, DRAWN_PROB, :, None]
            share = self.drawn.values[drawn_code]
            shared = drawn_code == REST
            drawn = entries.inside & ~ahead
            implied = np.where(shared, drawn, implied)
            probs += share * (drawn & ~implied)
        else:
            tail += self.logprob.probs(stored["tail_logprob"])[..., None]
        # What is left is not less than any other but the true token, unless it is shared.
        least = np.where(shared, 0, probs.max(-1, keepdims=True))
        known = self.logprob.probs(stored["label_logprob"])[..., None]
        probs += known * (at_label & ~implied)
        rest = 1 - tail - probs.sum(-1, keepdims=True)
        probs += np.maximum(rest / np.maximum(implied.sum(-1, keepdims=True), 1), least) * implied
        scale = 1 / (probs.sum(-1, keepdims=True) + tail)
        return (probs * scale).astype(np.float32), (tail * scale)[..., 0].astype(np.float32)

    def attributes(self, name: str) -> dict[str, Any]:
        """Return what a plain Zarr reader needs to decode an array."""
        if name.endswith("_logprob"):
            beside = {"temperatures": list(self.spec.temperatures)} if "tempered" in name else {}
            return self.logprob.attributes() | beside
        if name == "target_probs":
            zero = "what the other entries of the position leave of one"
            return {"levels": self.prob.levels, "power": POWER, "code_0": zero}
        if name == "position_fields":
            rest = "an equal share of what the exact entries leave of one"
            drawn = {"largest": 1 / self.drawn.size, "per_octave": 16, "code_255": rest}
            named: dict[str, Any] = {"fields": list(self.spec.fields)}
            return named | {"drawn_prob": drawn} if self.sampled else named
        if name == "target_ids":
            return {
                "planes": "bytes, lowest first, of differences of numbers, which begin anew with "
                "the exact and the drawn entries of each position",
                "numbers": "the frequent_ids of the domain's group, then all other ids in order",
            }
        return {}


def _take(row: Array, place: Array) -> Array:
    """Return (R, S, K) values of (R, width) at places."""
    flat = place.reshape(len(row), place.shape[1] * place.shape[2])
    return np.take_along_axis(row, flat, 1).reshape(place.shape)
