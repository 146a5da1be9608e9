"""The spec of a cache: what decides its bytes, and the arrays that follow from it.

Everything that the writing and the reading side must agree on is defined here once, with the
standard library and NumPy. The trade-off: the module knows the shape of everything and the meaning
of little; what a number means is said where it is computed, in `ddk_cache.format.codec`.

Shape letters: R rows, S positions in a row, K kept entries of a position, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ddk_cache.errors import CorruptCacheError, InputError, MismatchError, unknown
from ddk_cache.hashing import canonical, digest

FORMAT_VERSION = 3
"""The layout described in docs/format.md; any other version is refused by name."""


# --- names ------------------------------------------------------------------------------------

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_name(name: str) -> str:
    """Return a domain name that is safe as one part of a path and of a key.

    Raises:
        InputError: the name is empty, too long, or holds anything but letters, digits, - and _.
    """
    if not _SAFE_NAME.fullmatch(name):
        raise InputError(
            f"domain name {name!r} is not usable as a path part. Use up to 64 letters, digits, "
            "'-' and '_', beginning with a letter or digit."
        )
    return name


# --- what is stored at a position ---------------------------------------------------------------

TARGET_KINDS = {"topk": 1, "sampled": 2}
"""Kind → the least size that it can have."""


KEPT_MASS = 0.9995
"""Mass at which top-k entries stop. The tail holds what is left, with an error of 2⁻¹¹ nats."""


@dataclass(frozen=True)
class TargetSpec:
    """Which entries of the teacher's distribution are kept.

    `topk:64` keeps the likeliest ids: 64, or fewer where fewer have a mass of 0.9995. The mass can
    be given, as in `topk:64:0.999`. `sampled:24` keeps an unbiased sample: the fewest ids with
    which each drawn id counts at most 1/24. That is 24 ids or fewer.
    """

    kind: str
    size: int
    kept_mass: float = KEPT_MASS
    """Of top-k targets."""

    @classmethod
    def parse(cls, text: str) -> TargetSpec:
        """Read `kind:size` or `topk:size:mass`. Raises InputError on anything else."""
        kind, _, rest = text.partition(":")
        if kind not in TARGET_KINDS:
            raise InputError(unknown("kind of target", kind, TARGET_KINDS) + " Example: topk:64.")
        size, colon, mass = rest.partition(":")
        least = TARGET_KINDS[kind]
        if not (size.isascii() and size.isdecimal()) or int(size) < least:
            raise InputError(
                f"targets {text!r} need a size of at least {least}, for example '{kind}:12'."
            )
        if not colon:
            return cls(kind, int(size))
        number = re.fullmatch(r"([0-9]*\.)?[0-9]+(e-[0-9]+)?", mass)
        if kind != "topk" or not number or not 0 < float(mass) <= 1:
            raise InputError(
                f"targets {text!r}: only topk takes a mass, above 0 and at most 1, for example "
                "topk:64:0.999."
            )
        return cls(kind, int(size), float(mass))

    def __str__(self) -> str:
        mass = "" if self.kept_mass == KEPT_MASS else f":{self.kept_mass!r}"
        return f"{self.kind}:{self.size}{mass}"


# --- what a cache is ----------------------------------------------------------------------------


LARGEST = {
    "seq_len": 2**24,
    "vocab_size": 2**24,
    "chunk_rows": 2**20,
    "shard_rows": 2**24,
}
"""Bounds far above any real cache: a damaged number must not turn into an allocation. An id has
three bytes at most."""

LARGEST_CHUNK = 2**28
"""Entries in a chunk, at most; a chunk is decoded in memory as a whole."""

MOST_TEMPERATURES = 16

COMPRESSIONS = ("small", "fast")
"""zstd for fewer bytes, lz4 for less work at every reading."""

LEARN = ("assistant", "last", "all")
"""Tokens of a conversation that the loss counts: all that the assistant says, its last message, or
every token."""

WORDS = {"compression": COMPRESSIONS, "learn": LEARN}
"""Settings that are one of a few words."""

ADDED = ("learn",)
"""Settings that the first caches of this format do not have. They are written only where they are
not the default, so that a cache without them keeps its fingerprint."""

TOKEN_ARRAYS = ("tokens", "loss_mask")
"""Written when the rows are planned, before the teacher runs."""


class ArrayLayout(NamedTuple):
    """One array of a split: its first axis is rows, `inner` are the others."""

    dtype: np.dtype[Any]
    inner: tuple[int, ...]
    fill: int
    axes: tuple[str, ...] = ("position",)
    """Names of the inner axes."""


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Everything that decides the bytes of a cache, except the documents themselves."""

    seq_len: int
    """S: positions in a row. A row holds S+1 tokens."""
    vocab_size: int
    """V: width of the teacher's head. It may be padded beyond the tokenizer."""
    targets: TargetSpec
    """Which entries are kept."""
    holdout: float
    """Share of documents, chosen by content, that go to the validation split."""
    chunk_rows: int
    """Rows in a chunk: the unit of reading."""
    shard_rows: int
    """Rows in a shard: the unit of work, of writing and of commitment."""
    logprob_step: float
    """Nats between two neighbouring stored log-probabilities."""
    teacher: Mapping[str, str]
    """Name, class, dtype and content hash of the teacher."""
    tokenizer: Mapping[str, str]
    """Name and content hashes of the tokenizer."""
    prob_levels: int = 128
    """Steps between probability 0 and 1 on the scale on which kept probabilities are stored."""
    temperatures: tuple[float, ...] = ()
    """Temperatures other than 1 at which the mass outside of the top k is stored too."""
    seed: int = 0
    """Seed for drawing sampled targets."""
    compression: str = "small"
    """One of `COMPRESSIONS`."""
    learn: str = "assistant"
    """One of `LEARN`."""

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise InputError(
                    f"{name}: got {value}, expected a whole number from 1 to {most:,}."
                )
        if type(self.logprob_step) is not float or not 0 < self.logprob_step < 1:
            raise InputError(f"logprob_step: got {self.logprob_step}, expected a float in (0, 1).")
        for name in ("teacher", "tokenizer"):
            facts = getattr(self, name)
            if not isinstance(facts, Mapping) or {type(fact) for fact in facts.values()} - {str}:
                raise InputError(f"{name}: got {facts!r}, expected a mapping of names to text.")
        self._check_targets()
        if self.targets.size > self.vocab_size:
            raise InputError(
                f"targets {self.targets} ask for more entries than the teacher's vocabulary has "
                f"({self.vocab_size:,})."
            )
        if type(self.holdout) not in (int, float) or not 0 <= self.holdout < 1:
            raise InputError(f"holdout: got {self.holdout}, expected a number in [0, 1).")
        if self.shard_rows % self.chunk_rows:
            raise InputError(
                f"a shard of {self.shard_rows} rows is not a whole number of chunks of "
                f"{self.chunk_rows} rows."
            )
        if self.chunk_rows * self.seq_len * self.targets.size > LARGEST_CHUNK:
            raise InputError(
                f"a chunk of {self.chunk_rows} rows of {self.seq_len:,} positions with "
                f"{self.targets.size} entries is too large; use fewer --chunk-rows."
            )

    def _check_targets(self) -> None:
        """Check the settings that decide how targets are drawn and stored."""
        if type(self.prob_levels) is not int or not 16 <= self.prob_levels <= 255:
            raise InputError(f"prob_levels: got {self.prob_levels}, expected 16 to 255.")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise InputError(f"seed: got {self.seed}, expected a whole number from 0 to 2^63 - 1.")
        for name, words in WORDS.items():
            if getattr(self, name) not in words:
                raise InputError(unknown(name, str(getattr(self, name)), words))
        declared = self.temperatures
        if (
            type(declared) is not tuple
            or len(declared) > MOST_TEMPERATURES
            or any(type(t) is not float or not 0.01 <= t <= 100 or t == 1 for t in declared)
            or list(declared) != sorted(set(declared))
        ):
            raise InputError(
                f"temperatures: got {declared}, expected different numbers from 0.01 to 100, "
                "without 1, which is always stored."
            )
        if declared and self.targets.kind != "topk":
            raise InputError(
                f"targets {self.targets} are drawn at temperature 1 and are unbiased only there; "
                "temperatures can be declared for topk."
            )

    @property
    def arrays(self) -> dict[str, ArrayLayout]:
        """The arrays of every split, by name. Their order is the order of writing."""
        S, K, T = self.seq_len, self.targets.size, len(self.temperatures)
        ids = np.dtype("<u2" if self.vocab_size < 2**16 else "<u4")
        counts = np.dtype("u1" if K < 2**8 else "<u2")
        byte, logprob = np.dtype("u1"), np.dtype("<u2")
        layouts = {
            "tokens": ArrayLayout(ids, (S + 1,), int(np.iinfo(ids).max), ("token",)),
            "loss_mask": ArrayLayout(byte, (S,), 0),
            "label_logprob": ArrayLayout(logprob, (S,), 0),
            "label_kept": ArrayLayout(byte, (S,), 0),
            "exact_count": ArrayLayout(counts, (S,), 0),
            "target_ids": ArrayLayout(byte, (self.id_bytes, S * K), 0, ("byte", "entry")),
            "target_probs": ArrayLayout(byte, (S * K,), 0, ("entry",)),
        }
        if self.targets.kind == "sampled":
            layouts["drawn_count"] = ArrayLayout(counts, (S,), 0)
            layouts["drawn_prob"] = ArrayLayout(byte, (S,), 0)
        else:
            layouts["tail_logprob"] = ArrayLayout(logprob, (S,), 0)
        if T:
            layouts["tempered_tail_logprob"] = ArrayLayout(
                logprob, (T, S), 0, ("temperature", "position")
            )
        return layouts

    def temperature_place(self, temperature: float) -> int:
        """Return the index of a declared temperature. Raises MismatchError, with the reason."""
        if temperature in self.temperatures:
            return self.temperatures.index(temperature)
        if self.targets.kind != "topk":
            reason = (
                f"targets {self.targets} are drawn at temperature 1 and are biased at any other"
            )
        else:
            reason = "the mass outside of the top k at it was not stored"
        known = ", ".join(f"{t:g}" for t in sorted([1.0, *self.temperatures]))
        raise MismatchError(
            f"this cache cannot be read at temperature {temperature:g}: {reason}. It can be read "
            f"at {known}; others are declared when a cache is built (--temperature, for topk)."
        )

    @property
    def id_bytes(self) -> int:
        """Return how many bytes an id needs."""
        return max(1, -(-(self.vocab_size - 1).bit_length() // 8))

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting as plain JSON values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | {
            "targets": str(self.targets),
            "teacher": dict(self.teacher),
            "tokenizer": dict(self.tokenizer),
            "temperatures": list(self.temperatures),
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, as they are stored; `from_json` reads them back."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in self.settings.items()
            if name not in ADDED or value != defaults[name]
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CacheSpec:
        """Read what `to_json` wrote. Raises CorruptCacheError on anything else."""
        try:
            return cls(
                **{
                    **values,
                    "targets": TargetSpec.parse(values["targets"]),
                    "temperatures": tuple(values.get("temperatures", ())),
                }
            )
        except (InputError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise CorruptCacheError(f"the spec of this cache is unreadable: {error}") from error

    @property
    def chunks_per_shard(self) -> int:
        """Return how many chunks a shard has."""
        return self.shard_rows // self.chunk_rows

    @property
    def fingerprint(self) -> str:
        """Hash of the spec. Every record carries it, so records of two caches never mix."""
        return digest(canonical(self.to_json()))
