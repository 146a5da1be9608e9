"""The domains and splits of a cache, as mappings and sequences of rows.

Rows are numbered 0 … len − 1 here, although the rows of a cache that has grown have gaps on disk.
The price is a little arithmetic at each read; whoever reads millions of rows by their numbers on
disk calls `Cache.fill`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ddk_cache.errors import InputError, RowRangeError, UnknownNameError, unknown
from ddk_cache.format.plan import rows_at
from ddk_cache.types import SPLITS, TRAIN, VALIDATION, Array, Rows

if TYPE_CHECKING:
    from ddk_cache.read.cache import Cache


class Split:
    """The valid rows of one split of a domain: `split[3]`, `split[-10:]`, `split[[5, 1]]`."""

    def __init__(self, cache: Cache, domain: str, name: str) -> None:
        self.cache, self.domain, self.name = cache, domain, name

    def __len__(self) -> int:
        """Return the number of valid rows."""
        return self.cache.plan(self.domain).rows(self.name)

    def __getitem__(self, places: int | slice | Sequence[int] | Array) -> Rows:
        """Return rows by their places 0 … len − 1, in the order asked for; negative ones count
        from the end. A single place returns one row, without the axis R.

        Raises:
            InputError: the places are not integers.
            RowRangeError: there is no such row.
            UnfinishedCacheError, CorruptCacheError: see `Cache.fill`.
        """  # noqa: D205
        if isinstance(places, slice):
            return self._read(np.arange(*places.indices(len(self))))
        numbers = integers(places, str(self))
        if numbers.ndim == 0:
            return self._read(numbers[None]).first()
        return self._read(numbers)

    def _read(self, places: Array) -> Rows:
        count = len(self)
        if (wrong := places[(places < -count) | (places >= count)]).size:
            raise RowRangeError(f"{self}: there is no row {wrong[0]}; it has {count:,} rows.")
        extents = self.cache.extents(self.domain, self.name)
        rows = rows_at(extents, np.where(places < 0, places + count, places))
        return self.cache.read(self.domain, self.name, rows)

    def __iter__(self) -> Iterator[Rows]:
        return (self[place] for place in range(len(self)))

    @cached_property
    def _sums(self) -> tuple[float, int]:
        return self.cache.teacher_loss(self.domain, self.name)

    @property
    def teacher_loss(self) -> float | None:
        """Return the teacher's mean loss in nats per counted position of committed rows, or None
        where no position counts.
        """  # noqa: D205
        loss, positions = self._sums
        return loss / positions if positions else None

    @property
    def positions(self) -> int:
        """Return the number of positions in committed rows where the loss counts."""
        return self._sums[1]

    def __str__(self) -> str:
        return f"{self.cache.uri}: {self.domain}/{self.name}"

    def __repr__(self) -> str:
        return f"<Split {self.domain}/{self.name}: {len(self):,} rows>"


class Domain(Mapping[str, Split]):
    """The splits of one domain: `domain.train`, `domain.validation`, or by name."""

    def __init__(self, cache: Cache, name: str) -> None:
        self.cache, self.name = cache, name
        self.train = Split(cache, name, TRAIN)
        self.validation = Split(cache, name, VALIDATION)

    def __getitem__(self, split: str) -> Split:
        """Return a split. Raises UnknownNameError where there is none of this name."""
        check_split(split, f"{self.cache.uri}: {self.name}")
        return self.train if split == TRAIN else self.validation

    def __iter__(self) -> Iterator[str]:
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)

    def __repr__(self) -> str:
        rows = ", ".join(f"{len(split):,} {name} rows" for name, split in self.items())
        return f"<Domain {self.name}: {rows}>"


def check_split(name: str, where: str) -> None:
    """Raise UnknownNameError unless a split has this name."""
    if name not in SPLITS:
        raise UnknownNameError(f"{where}: {unknown('split', str(name), SPLITS)}")


def integers(values: Any, where: str) -> Array:
    """Return int64 of integers in a list, an array or a tensor, or of one integer.

    Raises:
        InputError: they are of another type, or of more than one dimension.
    """
    found = np.asarray(values)
    if (found.dtype.kind not in "iu" and found.size) or found.ndim > 1:
        raise InputError(
            f"{where}: got {str(values)[:80]} for row numbers, expected an integer, a slice, or a "
            "list of integers."
        )
    return found.astype(np.int64, copy=False)
