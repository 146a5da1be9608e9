"""A cache for reading: a mapping of domains, and their committed rows as stored or decoded.

Rows are copied out of chunks that `ddk_cache.read.chunks` reads and keeps. Only committed shards
are read: a missing one is a named error, never Zarr's silent fill value. A row costs its whole
chunk, which is why neighbors in a training order should share one.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ddk_cache.errors import (
    InputError,
    RowRangeError,
    UnfinishedCacheError,
    UnknownNameError,
    unknown,
)
from ddk_cache.format.codec import LogprobCodec, TargetCodec
from ddk_cache.format.commit import Record, committed_of, read_record, read_records
from ddk_cache.format.manifest import Manifest
from ddk_cache.format.plan import DomainPlan, Extent, ShardKey, extents, rows_at, shard_count
from ddk_cache.format.spec import CacheSpec
from ddk_cache.read.chunks import ChunkKey, Chunks
from ddk_cache.read.split import Domain, check_split, integers
from ddk_cache.read.tokenizer import copy_tokenizer
from ddk_cache.storage.base import Storage
from ddk_cache.storage.local import LocalStorage
from ddk_cache.storage.open import is_url, open_storage
from ddk_cache.types import SPLITS, Array, Rows

ROWS_AT_ONCE = 64
"""Rows whose chunks are held at the same time, however many are asked for."""

RECORDS_AT_ONCE = 256
"""Records asked for together."""

RESUME = "Run the same 'ddk-cache build' again to resume where it stopped."


def open_cache(
    path: str | Path,
    *,
    unfinished: bool = False,
    shard_cache: str | Path = "",
    shard_cache_size: str = "50G",
) -> Cache:
    """Open a cache for reading. Its path or URL is all that is needed; `with` closes it again.

    With `shard_cache`, shards read from a URL are kept whole in that directory, up to a size.

    Raises:
        InputError: the URL cannot be opened, the size is not one, or `shard_cache` is given for a
            local path.
        StorageError: the store does not answer.
        NotACacheError, FormatVersionError, CorruptCacheError: see `Manifest.read`.
        UnfinishedCacheError: not every planned row is committed, unless `unfinished` is true.
    """
    storage = open_storage(path)
    if shard_cache:
        from ddk_cache.storage.shard_cache import ShardCache, parse_size

        size = parse_size(shard_cache_size)
        if not is_url(path):
            raise InputError(
                f"{path} is on a local disk already: a shard cache is for URLs. Leave it out."
            )
        storage = ShardCache(storage, Path(shard_cache), size)
    cache = Cache(storage, Manifest.read(storage))
    if not unfinished:
        cache.require_finished()
    return cache


class Cache(Mapping[str, Domain]):
    """A cache: domain → its splits, whose rows are read by place, as `cache["code"].train[:8]`.

    Any thread may read, and so may a forked process or one that a pickle of the cache is sent to.
    Methods that take row numbers mean those of the Zarr arrays, which skip padding.
    """

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.manifest = manifest
        self.uri = storage.uri()
        """Path or URL."""
        self.logprob = LogprobCodec(manifest.spec.logprob_step)
        self._storage: Storage | None = storage
        self._domains = {name: Domain(self, name) for name in sorted(manifest.plans)}
        self._extents = {pair: self.extents(*pair) for pair in self._pairs}
        self._committed = {
            pair: committed_of(storage, *pair, self.shard_count(*pair)) for pair in self._pairs
        }
        self._codecs: dict[str, TargetCodec] = {}
        self._reader: Chunks | None = None
        self._process = 0

    # --- what it is ---

    def __getitem__(self, domain: str) -> Domain:
        """Return a domain. Raises UnknownNameError where there is none of this name."""
        self.plan(domain)
        return self._domains[domain]

    def __iter__(self) -> Iterator[str]:
        return iter(self._domains)

    def __len__(self) -> int:
        return len(self._domains)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        spec, done, total = self.spec, *self.progress()
        state = "finished" if done == total and not self._unplanned else f"{done:,} rows committed"
        return (
            f"<Cache {self.uri}: {spec.targets} of {spec.vocab_size:,} ids, rows of "
            f"{spec.seq_len:,} tokens; {total:,} rows of {', '.join(self) or 'no domain yet'}; "
            f"{state if self._storage else 'closed'}>"
        )

    @property
    def where(self) -> str:
        """Return the path or URL."""
        return self.uri

    @property
    def root(self) -> Path:
        """Return the directory of the cache. Raises InputError where it is not in one."""
        if not isinstance(self.storage, LocalStorage):
            raise InputError(f"{self.uri} is not in a local directory.")
        return self.storage.root

    @property
    def spec(self) -> CacheSpec:
        """Return the settings that decide the bytes of the cache."""
        return self.manifest.spec

    @property
    def domains(self) -> list[str]:
        """Return the names of the domains, sorted."""
        return list(self._domains)

    def plan(self, domain: str) -> DomainPlan:
        """Return the planned rows of a domain. Raises UnknownNameError where it is unknown."""
        if domain not in self.manifest.plans:
            raise UnknownNameError(f"{self.uri}: {unknown('domain', str(domain), self.domains)}")
        return self.manifest.plans[domain]

    @cached_property
    def tokenizer_path(self) -> Path:
        """Return a private directory with a checked copy of the tokenizer; see `copy_tokenizer`."""
        return copy_tokenizer(self.storage, self.manifest.root.tokenizer_files, self)

    # --- open and closed ---

    @property
    def storage(self) -> Storage:
        """Return the directory or object store. Raises InputError where the cache is closed."""
        if self._storage is None:
            raise InputError(f"{self.uri} is closed. Open it again with open_cache.")
        return self._storage

    def close(self) -> None:
        """Close files and connections, and free the memory of what was read."""
        if self._storage:
            self._storage.close()
        if self._reader and self._process == os.getpid():
            self._reader.close()
        self._storage = self._reader = None

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Cache], tuple[Storage, Manifest]]:
        return Cache, (self.storage, self.manifest)

    @property
    def _chunks(self) -> Chunks:
        """Return this process's own reader: a lock held while forking would stay locked."""
        if self._reader is None or self._process != os.getpid():
            self._reader = Chunks(self.storage, self.manifest, self._require_committed)
            self._process = os.getpid()
        return self._reader

    # --- which rows there are ---

    @property
    def _pairs(self) -> list[tuple[str, str]]:
        return [(domain, split) for domain in self._domains for split in SPLITS]

    @property
    def _unplanned(self) -> list[str]:
        return sorted(set(self.manifest.root.sources) - set(self._domains))

    def extents(self, domain: str, split: str) -> list[Extent]:
        """Return where the valid rows of a split lie. UnknownNameError: there is no such split."""
        plan = self.plan(domain)
        check_split(split, f"{self.uri}: {domain}")
        return extents(plan, split, self.spec.shard_rows)

    def row_numbers(self, domain: str, split: str) -> Array:
        """Return the numbers of all valid rows of a split, ascending, int64."""
        return rows_at(self.extents(domain, split), np.arange(self.plan(domain).rows(split)))

    def shard_count(self, domain: str, split: str) -> int:
        """Return the number of planned shards of a split."""
        return shard_count(self.plan(domain), split, self.spec.shard_rows)

    def committed(self, domain: str, split: str) -> list[int]:
        """Return the numbers of the committed shards of a split, ascending."""
        numbers: list[int] = np.flatnonzero(self._committed[domain, split]).tolist()
        return numbers

    def committed_extents(self, domain: str, split: str) -> list[Extent]:
        """Return where the rows of committed shards lie, an extent for each shard."""
        size, ends = self.spec.shard_rows, [e.start + e.rows for e in self.extents(domain, split)]
        starts = [number * size for number in self.committed(domain, split)]
        lasts = [ends[bisect_right(ends, start)] for start in starts]
        return [
            Extent(start, min(size, last - start))
            for start, last in zip(starts, lasts, strict=True)
        ]

    def committed_rows(self, domain: str, split: str) -> int:
        """Return the number of valid rows in committed shards."""
        there = self._committed[domain, split]
        if there.all():
            return self.plan(domain).rows(split)
        return sum(extent.rows for extent in self.committed_extents(domain, split))

    def is_committed(self, key: ShardKey) -> bool:
        """Return whether a shard has a record."""
        return bool(self._committed[key.domain, key.split][key.number])

    def _require_committed(self, key: ShardKey) -> None:
        if not self.is_committed(key):
            raise UnfinishedCacheError(f"{self.uri}: shard {key} is not committed. {RESUME}")

    def progress(self) -> tuple[int, int]:
        """Return the committed and the planned rows."""
        done = sum(self.committed_rows(*pair) for pair in self._pairs)
        return done, sum(self.plan(domain).rows(split) for domain, split in self._pairs)

    def require_finished(self) -> None:
        """Raise UnfinishedCacheError unless every row of every domain is committed."""
        done, total = self.progress()
        if missing := ", ".join(self._unplanned):
            raise UnfinishedCacheError(
                f"{self.uri} is not finished: the rows of {missing} are not planned yet. {RESUME}"
            )
        if done < total:
            raise UnfinishedCacheError(
                f"{self.uri} is not finished: {done:,} of {total:,} rows are committed. {RESUME}"
            )

    # --- records ---

    def record(self, key: ShardKey) -> Record:
        """Return the commit record of a shard. Raises CorruptCacheError where it is damaged."""
        return read_record(self.storage, self.manifest, key)

    def records(self, domain: str, split: str) -> Iterator[Record]:
        """Yield the commit records of a split, each checked against the spec."""
        keys = [ShardKey(domain, split, number) for number in self.committed(domain, split)]
        for first in range(0, len(keys), RECORDS_AT_ONCE):
            part = keys[first : first + RECORDS_AT_ONCE]
            yield from read_records(self.storage, self.manifest, part)

    def teacher_loss(self, domain: str, split: str) -> tuple[float, int]:
        """Return the teacher's summed loss (nats) over a split and the positions counted."""
        records = list(self.records(domain, split))
        return sum(r.teacher_loss for r in records), sum(r.positions for r in records)

    # --- rows ---

    def codec(self, domain: str) -> TargetCodec:
        """Return the codec of the targets of a domain."""
        if domain not in self._codecs:
            self._codecs[domain] = TargetCodec(self.spec, self.plan(domain).frequent_ids)
        return self._codecs[domain]

    def read(
        self, domain: str, split: str, rows: Sequence[int] | Array, *, temperature: float = 1.0
    ) -> Rows:
        """Read rows by number, decoded, in the order asked for, with targets at a temperature.

        Raises:
            MismatchError: the cache does not have the targets at this temperature.
            InputError, UnfinishedCacheError, CorruptCacheError: see `fill`.
        """
        if temperature != 1:
            self.spec.temperature_place(temperature)
        stored = self.read_stored(domain, split, rows)
        return Rows(
            tokens=stored["tokens"].astype(np.int64),
            targets=self.codec(domain).targets(stored, temperature),
            label_logprob=self.logprob.decode(stored["label_logprob"]),
            loss_mask=stored["loss_mask"].astype(bool),
            segments=stored["segments"].astype(np.int64) if "segments" in stored else None,
        )

    def read_stored(
        self,
        domain: str,
        split: str,
        rows: Sequence[int] | Array,
        names: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Return (R, …) of the named arrays, or of all, as stored, in the order asked for."""
        self.extents(domain, split)  # raises for an unknown domain or split, also without rows
        numbers = integers(rows, self.uri).reshape(-1)
        for row in numbers[:1].tolist():
            self._check_valid(domain, split, row)
            self._prove((domain, split, row // self.spec.chunk_rows), names)
        out = self._allocate(len(numbers), names)
        self.fill(split, [domain] * len(numbers), numbers, out)
        return out

    def buffers(self, rows: int, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Return uninitialized (R, …) arrays for the named stored arrays, or for all."""
        some = next((pair for pair in self._pairs if self._committed[pair].any()), None)
        if some:
            first = self.committed(*some)[0] * self.spec.chunks_per_shard
            self._prove((*some, first), names)
        return self._allocate(rows, names)

    def _prove(self, chunk: tuple[str, str, int], names: Sequence[str] | None) -> None:
        """Read a chunk, so that a false size in the spec is found before memory is taken for it."""
        self._chunks([ChunkKey(*chunk, tuple(names or self.spec.arrays))])

    def _allocate(self, rows: int, names: Sequence[str] | None) -> dict[str, Array]:
        return {
            name: np.empty((rows, *layout.inner), layout.dtype)
            for name, layout in self.spec.arrays.items()
            if names is None or name in names
        }

    def fill(
        self,
        split: str,
        domains: Sequence[str],
        rows: Sequence[int] | Array,
        out: Mapping[str, Array],
    ) -> None:
        """Copy row `rows[n]` of `domains[n]`, as stored, to place n of the arrays of `out`.

        Only the arrays in `out` are read. `out` may be used again and again.

        Raises:
            InputError: a number is not an integer, or not that of a valid row (RowRangeError).
            UnfinishedCacheError: the shard of a row is not committed.
            CorruptCacheError: stored bytes are not those that were committed.
        """
        numbers, size, names = integers(rows, self.uri).tolist(), self.spec.chunk_rows, tuple(out)
        for domain, row in zip(domains, numbers, strict=True):
            self._check_valid(domain, split, row)
        for first in range(0, len(numbers), ROWS_AT_ONCE):
            piece = range(first, min(first + ROWS_AT_ONCE, len(numbers)))
            chunks = self._chunks(
                [ChunkKey(domains[n], split, numbers[n] // size, names) for n in piece]
            )
            for n, chunk in zip(piece, chunks, strict=True):
                row = numbers[n] % size
                for target, values in zip(out.values(), chunk.values, strict=True):
                    target[n] = values[row]

    def _check_valid(self, domain: str, split: str, row: int) -> None:
        runs = self._extents.get((domain, split)) or self.extents(domain, split)
        run = bisect_right(runs, row, key=lambda extent: extent.start) - 1
        if run < 0 or row >= runs[run].start + runs[run].rows:
            raise RowRangeError(
                f"{self.uri}: {domain}/{split} has no row {row}; it has "
                f"{self.plan(domain).rows(split):,} rows."
            )
