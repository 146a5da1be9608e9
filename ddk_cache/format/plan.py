"""The plan of a domain: its rows, in portions, and the shards that they fill.

Where a row lies is arithmetic on the plan: no list here is as long as the cache. The price is that
array rows are not numbered without gaps: a portion begins on a shard border.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ddk_cache.types import Array


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
    padding: int = 0
    """Tokens of padding in them, where documents are kept apart."""
    lost: int = 0
    """Tokens of the documents of this portion that are in no row: too long, and not split."""


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
    passages: bool = False
    """Long documents are cut into passages, of which a share is held out."""

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

    @property
    def padding(self) -> int:
        """Return the tokens of padding in all rows."""
        return sum(portion.padding for portion in self.portions)

    @property
    def lost(self) -> int:
        """Return the tokens of documents that are in no row."""
        return sum(portion.lost for portion in self.portions)

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
    """What the plan says about one shard."""

    rows: int
    """Valid rows; the rest is padding."""
    content: str
    """Hash of the documents of the portion that its rows come from."""


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
    """Return the array rows, int64, of valid rows given by their places 0, 1, … in some extents."""
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
