"""The shared vocabulary of a cache: format version, arrays, spec, records' types and errors.

Everything that two rooms of the project must agree on stands here once, in the standard library
and NumPy, so that any file may import it and none pays for it. The trade-off: the file knows the
shape of everything and the meaning of little; what a number means is said where it is computed.

Shape letters: R rows, S positions in a row, K kept entries of a position, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

FORMAT_VERSION = 2
"""The layout described in docs/format.md: what is written."""

READABLE_VERSIONS = (1, 2)
"""What is read; any other is named and refused. Version 1 kept whole ids in order of value, and
16-bit log-probabilities."""

SPLITS = ("train", "validation")
"""Rows to learn from, and held-out rows on which the gap is measured."""

Array = npt.NDArray[Any]


# --- errors -----------------------------------------------------------------------------------


class DDKError(Exception):
    """Anything that a person has to know: the message says what, where, and what to do next."""

    exit_code = 1


class InputError(DDKError):
    """The request cannot be met as it was given (exit code 2)."""

    exit_code = 2


class CacheError(DDKError):
    """A cache on disk is not what it has to be."""


class NotACacheError(CacheError):
    """The path holds no ddk cache."""


class FormatVersionError(CacheError):
    """The cache was written in a format that this version does not read."""


class UnfinishedCacheError(CacheError):
    """Rows were asked for that no committed shard holds."""


class CorruptCacheError(CacheError):
    """Stored bytes differ from what was committed."""


class StorageError(CacheError):
    """The place where a cache lies did not answer, or refused."""


class MismatchError(CacheError):
    """Two things that must agree (a cache and a request, a cache and a student) do not."""

    exit_code = 2


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """Say that `given` is no known `what`, with the nearest known word and the whole list."""
    words = sorted(known)
    near = difflib.get_close_matches(given, words, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {given!r}.{hint} Known: {', '.join(words)}."


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


@dataclass(frozen=True)
class TargetSpec:
    """Which entries of the teacher's distribution are kept.

    `topk:64` keeps the 64 likeliest. `sampled:12` keeps 12: the likeliest as they are, and a draw
    of the others that is right on average.
    """

    kind: str
    size: int

    @classmethod
    def parse(cls, text: str) -> TargetSpec:
        """Read `kind:size`. Raises InputError on an unknown kind or a size that is too small."""
        kind, _, size = text.partition(":")
        if kind not in TARGET_KINDS:
            raise InputError(unknown("kind of target", kind, TARGET_KINDS) + " Example: topk:64.")
        least = TARGET_KINDS[kind]
        if not size.isdecimal() or int(size) < least:
            raise InputError(
                f"targets {text!r} need a size of at least {least}, for example '{kind}:12'."
            )
        return cls(kind, int(size))

    def __str__(self) -> str:
        return f"{self.kind}:{self.size}"


A = TypeVar("A")


@dataclass(frozen=True)
class SparseTargets(Generic[A]):
    """A teacher distribution at each position: kept entries and the mass of everything else.

    The probabilities are of the full vocabulary; kept entries and tail sum to one, and of sampled
    targets the entries alone do. The arrays are NumPy's when they come from a cache and torch's
    in a training step.
    """

    ids: A
    """(..., K) token ids."""
    probs: A
    """(..., K) float32 probabilities."""
    tail: A
    """(...) float32, the probability of all ids that were not kept."""


@dataclass(frozen=True)
class Rows:
    """Rows read from a cache, decoded."""

    tokens: Array
    """(R, S+1) int64: position s predicts token s+1."""
    targets: SparseTargets[Array]
    """(R, S, K)"""
    label_logprob: Array
    """(R, S) float32, the teacher's log-probability of the true next token, nats."""
    loss_mask: Array
    """(R, S) bool, where the loss counts."""


# --- what a cache is ----------------------------------------------------------------------------


LARGEST = {
    "seq_len": 2**24,
    "vocab_size": 2**31 - 1,
    "chunk_rows": 2**20,
    "shard_rows": 2**24,
}
"""Bounds that no real cache meets: a damaged number must not turn into an allocation."""

SINCE_VERSION_2 = ("prob_levels", "temperatures", "seed", "compression")
"""Settings that a spec of version 1 does not have."""

LARGEST_CHUNK = 2**28
"""Entries in a chunk, at most; a chunk is decoded in memory as a whole."""


MOST_TEMPERATURES = 16

COMPRESSIONS = ("small", "fast")
"""zstd for fewer bytes, lz4 for less work at every reading."""


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
    """Temperatures beside 1 at which the mass outside of the top k is stored too."""
    seed: int = 0
    """Of the draws of sampled targets."""
    compression: str = "small"
    """One of `COMPRESSIONS`."""
    format_version: int = FORMAT_VERSION
    """Stands in the documents beside the spec, not in it."""

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise InputError(
                    f"{name} has to be a whole number from 1 to {most:,}, not {value}."
                )
        if type(self.logprob_step) is not float or not 0 < self.logprob_step < 1:
            raise InputError(f"logprob_step has to be in (0, 1), not {self.logprob_step}.")
        for name in ("teacher", "tokenizer"):
            facts = getattr(self, name)
            if not isinstance(facts, Mapping) or {type(fact) for fact in facts.values()} - {str}:
                raise InputError(f"{name} has to map names to text, not {facts!r}.")
        self._check_version_2()
        if self.targets.size > self.vocab_size:
            raise InputError(
                f"targets {self.targets} ask for more entries than the teacher's vocabulary has "
                f"({self.vocab_size:,})."
            )
        if type(self.holdout) not in (int, float) or not 0 <= self.holdout < 1:
            raise InputError(f"holdout has to be in [0, 1), not {self.holdout}.")
        if self.shard_rows % self.chunk_rows:
            raise InputError(
                f"a shard of {self.shard_rows} rows is no whole number of chunks of "
                f"{self.chunk_rows} rows."
            )
        if self.chunk_rows * self.seq_len * self.targets.size > LARGEST_CHUNK:
            raise InputError(
                f"a chunk of {self.chunk_rows} rows of {self.seq_len:,} positions with "
                f"{self.targets.size} entries is too large; give fewer --chunk-rows."
            )

    def _check_version_2(self) -> None:
        """Check the settings that version 1 did not have."""
        if type(self.prob_levels) is not int or not 16 <= self.prob_levels <= 255:
            raise InputError(f"prob_levels has to be from 16 to 255, not {self.prob_levels}.")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise InputError(f"seed has to be a whole number of 0 or more, not {self.seed}.")
        if self.compression not in COMPRESSIONS:
            raise InputError(unknown("compression", str(self.compression), COMPRESSIONS))
        declared = self.temperatures
        if (
            type(declared) is not tuple
            or len(declared) > MOST_TEMPERATURES
            or any(type(t) is not float or not 0.01 <= t <= 100 or t == 1 for t in declared)
            or list(declared) != sorted(set(declared))
        ):
            raise InputError(
                f"temperatures have to be different numbers from 0.01 to 100 beside 1, which is "
                f"always there, not {declared}."
            )
        if declared and self.targets.kind != "topk":
            raise InputError(
                f"targets {self.targets} are drawn at temperature 1 and are right on average only "
                "there; temperatures can be declared for topk."
            )

    @property
    def arrays(self) -> dict[str, ArrayLayout]:
        """The arrays of every split, by name. Their order is the order of writing."""
        S, K, T = self.seq_len, self.targets.size, len(self.temperatures)
        ids = np.dtype("<u2" if self.vocab_size < 2**16 else "<u4")
        byte, logprob = np.dtype("u1"), np.dtype("<u2")
        impossible = int(np.iinfo(ids).max)
        entry = ("position", "entry")
        layouts = {
            "tokens": ArrayLayout(ids, (S + 1,), impossible),
            "loss_mask": ArrayLayout(byte, (S,), 0),
        }
        if self.format_version == 1:
            layouts["target_ids"] = ArrayLayout(ids, (S, K), impossible, entry)
            layouts["target_logprobs"] = ArrayLayout(logprob, (S, K), 0, entry)
        else:
            inner = (self.id_bytes, S, K)
            layouts["target_ids"] = ArrayLayout(byte, inner, 255, ("byte", *entry))
            layouts["target_probs"] = ArrayLayout(byte, (S, K), 0, entry)
        layouts["tail_logprob"] = ArrayLayout(logprob, (S,), 0)
        layouts["label_logprob"] = ArrayLayout(logprob, (S,), 0)
        if T:
            layouts["tempered_tail_logprob"] = ArrayLayout(
                logprob, (T, S), 0, ("temperature", "position")
            )
        return layouts

    def temperature_place(self, temperature: float) -> int:
        """Return the place of a declared temperature. Raises MismatchError, with the reason."""
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
            f"this cache cannot be read at temperature {temperature:g}: {reason}. It can at "
            f"{known}; others are declared when a cache is built (--temperature, for topk)."
        )

    @property
    def id_bytes(self) -> int:
        """Return how many bytes an id needs."""
        return max(1, -(-(self.vocab_size - 1).bit_length() // 8))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` reads them back."""
        fields = [field.name for field in dataclasses.fields(self)][:-1]
        if self.format_version == 1:
            fields = [name for name in fields if name not in SINCE_VERSION_2]
        return (
            {name: getattr(self, name) for name in fields}
            | {
                "targets": str(self.targets),
                "teacher": dict(self.teacher),
                "tokenizer": dict(self.tokenizer),
            }
            | ({"temperatures": list(self.temperatures)} if self.format_version > 1 else {})
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any], version: int = FORMAT_VERSION) -> CacheSpec:
        """Read what `to_json` wrote. Raises CorruptCacheError on anything else."""
        try:
            return cls(
                **{
                    **values,
                    "targets": TargetSpec.parse(values["targets"]),
                    "temperatures": tuple(values.get("temperatures", ())),
                    "format_version": version,
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


@dataclass(frozen=True)
class Portion:
    """A run of documents of a domain, and the rows that they were cut into.

    The first portion is what the domain was planned with; each later one is what it grew by.
    """

    documents: int
    """Documents up to and with this portion."""
    tokens: int
    """Their tokens, before they were cut into rows."""
    content: str
    """Hash of those documents in order."""
    rows: Mapping[str, int]
    """Rows of this portion, by split."""


@dataclass(frozen=True)
class DomainPlan:
    """The rows of one domain, fixed before the teacher sees the first of them.

    The rows of a portion begin on a shard border, so that growing changes no byte already
    written.
    """

    portions: tuple[Portion, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Path below the root → text of each Zarr document of the domain."""
    frequent_ids: tuple[int, ...] = ()
    """The most frequent ids of the first portion, the most frequent first: they get the smallest
    numbers when kept ids are stored."""

    @property
    def documents(self) -> int:
        """Return the number of documents."""
        return self.portions[-1].documents

    @property
    def tokens(self) -> int:
        """Return the tokens of all documents."""
        return self.portions[-1].tokens

    @property
    def content(self) -> str:
        """Return the hash of all documents in order."""
        return self.portions[-1].content

    def rows(self, split: str) -> int:
        """Return the number of rows of a split, padding not counted."""
        return sum(portion.rows[split] for portion in self.portions)


class ShardKey(NamedTuple):
    """One shard of every array of a split."""

    domain: str
    split: str
    number: int

    def __str__(self) -> str:
        return f"{self.domain}/{self.split}/{self.number}"


class Extent(NamedTuple):
    """A run of valid rows: array rows start … start + rows − 1."""

    start: int
    rows: int


class Shard(NamedTuple):
    """What the plan says of one shard."""

    rows: int
    """Valid rows; the rest is padding."""
    content: str
    """Of the portion that its rows come from."""


def extents(plan: DomainPlan, split: str, shard_rows: int) -> list[Extent]:
    """Return where the rows of a split lie in its arrays: an extent for each portion."""
    found, start = [], 0
    for portion in plan.portions:
        rows = portion.rows[split]
        if rows:
            found.append(Extent(start, rows))
        start += -(-rows // shard_rows) * shard_rows
    return found


def rows_at(runs: Iterable[Extent], places: Array) -> Array:
    """Return the numbers of valid rows by their place among all rows of some extents, int64.

    Arithmetic on the extents: the rows of a cache are never listed.
    """
    starts, lengths = np.array([[0, 0], *runs], np.int64).T
    ends = np.cumsum(lengths)
    run = np.searchsorted(ends, places, side="right")
    rows: Array = starts[run] + places - (ends - lengths)[run]
    return rows


def shard_count(plan: DomainPlan, split: str, shard_rows: int) -> int:
    """Return the number of shards of a split."""
    return sum(-(-portion.rows[split] // shard_rows) for portion in plan.portions)


def shard_at(plan: DomainPlan, split: str, shard_rows: int, number: int) -> Shard:
    """Return one shard of a split. Raises IndexError where it is not planned."""
    for portion in plan.portions:
        first = number * shard_rows
        if 0 <= first < portion.rows[split]:
            return Shard(min(shard_rows, portion.rows[split] - first), portion.content)
        number -= -(-portion.rows[split] // shard_rows)
    raise IndexError(number)


# --- hashing ------------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    """Return the one JSON spelling of a value that hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(data: bytes) -> str:
    """Return the content hash used throughout: xxh3, 128 bits, in hex."""
    return xxhash.xxh3_128_hexdigest(data)
