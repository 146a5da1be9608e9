"""Committed rows of a cache, by number: as stored, or decoded.

Rows are copied out of chunks that `ddk_cache.chunks` reads and keeps. Only committed shards are
read: what is missing is a named error, never Zarr's silent fill value. A row costs its whole
chunk, which is why neighbours in a training order should share one.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ddk_cache.errors import CorruptCacheError, InputError, UnfinishedCacheError, unknown
from ddk_cache.format.codec import LogprobCodec, TargetCodec
from ddk_cache.format.commit import Record, committed, read_record
from ddk_cache.format.layout import TOKENIZER
from ddk_cache.format.manifest import Manifest
from ddk_cache.format.plan import DomainPlan, Extent, ShardKey, extents, rows_at, shard_count
from ddk_cache.format.spec import CacheSpec
from ddk_cache.hashing import digest
from ddk_cache.read.chunks import ChunkKey, Chunks
from ddk_cache.storage.base import Storage
from ddk_cache.storage.local import LocalStorage
from ddk_cache.storage.open import open_storage
from ddk_cache.types import SPLITS, Array, Rows

ROWS_AT_ONCE = 64
"""Rows whose chunks are held at the same time, however many are asked for."""


def open_cache(
    path: str | Path,
    *,
    unfinished: bool = False,
    shard_cache: str | Path = "",
    shard_cache_size: str = "50G",
) -> Cache:
    """Open a cache for reading. It needs nothing but the path, or the URL.

    With `shard_cache`, shards read from a URL are kept whole in that directory, up to a size.

    Raises:
        InputError: the URL cannot be opened, or the size is none.
        StorageError: the store does not answer.
        NotACacheError, FormatVersionError, CorruptCacheError: see `Manifest.read`.
        UnfinishedCacheError: not every planned row is committed, unless `unfinished` is true.
    """
    storage = open_storage(path)
    if shard_cache and not isinstance(storage, LocalStorage):
        from ddk_cache.storage.shard_cache import ShardCache, parse_size

        storage = ShardCache(str(path), Path(shard_cache), parse_size(shard_cache_size))
    cache = Cache(storage, Manifest.read(storage))
    if not unfinished:
        cache.require_finished()
    return cache


class Cache:
    """A cache. Rows have the number that they have in the Zarr arrays. Any thread may read."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage = storage
        self.manifest = manifest
        self.logprob = LogprobCodec(manifest.spec.logprob_step)
        pairs = [(domain, split) for domain in self.domains for split in SPLITS]
        self._extents = {pair: self.extents(*pair) for pair in pairs}
        self._committed = {pair: self._find_committed(*pair) for pair in pairs}
        self._codecs: dict[str, TargetCodec] = {}
        self._chunks = Chunks(storage, manifest, self._require_committed)

    @property
    def where(self) -> str:
        """Return how a person finds the cache."""
        return self.storage.uri()

    @property
    def root(self) -> Path:
        """Return the directory of the cache. Raises InputError where it is not in one."""
        if not isinstance(self.storage, LocalStorage):
            raise InputError(f"{self.where} is not in a local directory.")
        return self.storage.root

    @property
    def spec(self) -> CacheSpec:
        """Return what the cache is."""
        return self.manifest.spec

    @property
    def domains(self) -> list[str]:
        """Return the names of the domains, sorted."""
        return sorted(self.manifest.plans)

    @cached_property
    def tokenizer_path(self) -> Path:
        """Return a local directory of the tokenizer's own files.

        Raises:
            CorruptCacheError: a file is not what it was.
        """
        if isinstance(self.storage, LocalStorage):
            return self.root / TOKENIZER
        folder = Path(tempfile.mkdtemp(prefix="ddk-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for name, (_, hashed) in self.manifest.root.tokenizer_files.items():
            data = self.storage.get(f"{TOKENIZER}/{name}")
            if data is None or digest(data) != hashed:
                raise CorruptCacheError(f"{self.where}/{TOKENIZER}/{name} is missing or damaged.")
            (folder / name).write_bytes(data)
        return folder

    def plan(self, domain: str) -> DomainPlan:
        """Return the planned rows of a domain. Raises InputError where it is unknown."""
        if domain not in self.manifest.plans:
            raise InputError(f"{self.where}: {unknown('domain', domain, self.domains)}")
        return self.manifest.plans[domain]

    def extents(self, domain: str, split: str) -> list[Extent]:
        """Return where the valid rows of a split lie."""
        return extents(self.plan(domain), split, self.spec.shard_rows)

    def row_numbers(self, domain: str, split: str) -> Array:
        """Return the numbers of all valid rows of a split, ascending, int64."""
        return rows_at(self.extents(domain, split), np.arange(self.plan(domain).rows(split)))

    def shard_count(self, domain: str, split: str) -> int:
        """Return the number of planned shards of a split."""
        return shard_count(self.plan(domain), split, self.spec.shard_rows)

    def _find_committed(self, domain: str, split: str) -> Array:
        """Return which planned shards are committed, (shards) bool, by their records' names."""
        found, planned = committed(self.storage, domain, split), self.shard_count(domain, split)
        if found and max(found) >= planned:
            raise CorruptCacheError(
                f"{self.where}: there is a record of shard {domain}/{split}/{max(found)}, "
                f"but {planned} shards are planned."
            )
        there = np.zeros(planned, bool)
        there[list(found)] = True
        return there

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

    def require_finished(self) -> None:
        """Raise UnfinishedCacheError unless every row of every domain is committed."""
        missing = sorted(set(self.manifest.root.sources) - set(self.manifest.plans))
        again = "Run the same 'ddk-cache build' again to go on."
        if missing:
            raise UnfinishedCacheError(
                f"{self.where} is not finished: the rows of {', '.join(missing)} are not planned "
                f"yet. {again}"
            )
        pairs = [(domain, split) for domain in self.domains for split in SPLITS]
        done = sum(self.committed_rows(*pair) for pair in pairs)
        total = sum(self.plan(domain).rows(split) for domain, split in pairs)
        if done < total:
            raise UnfinishedCacheError(
                f"{self.where} is not finished: {done:,} of {total:,} rows are committed. {again}"
            )

    def committed(self, domain: str, split: str) -> list[int]:
        """Return the numbers of the committed shards of a split, ascending."""
        numbers: list[int] = np.flatnonzero(self._committed[domain, split]).tolist()
        return numbers

    def is_committed(self, key: ShardKey) -> bool:
        """Return whether a shard has a record."""
        return bool(self._committed[key.domain, key.split][key.number])

    def _require_committed(self, key: ShardKey) -> None:
        if not self.is_committed(key):
            raise UnfinishedCacheError(
                f"{self.where}: shard {key} is not committed. Run the same 'ddk-cache build' "
                "again to go on."
            )

    def records(self, domain: str, split: str) -> Iterator[Record]:
        """Yield the commit records of a split, each checked against the spec."""
        for index in self.committed(domain, split):
            yield self.record(ShardKey(domain, split, index))

    def teacher_loss(self, domain: str, split: str) -> tuple[float, int]:
        """Return the teacher's summed loss (nats) over a split and the positions counted."""
        records = list(self.records(domain, split))
        return sum(r.teacher_loss for r in records), sum(r.positions for r in records)

    def record(self, key: ShardKey) -> Record:
        """Return the commit record of a shard. Raises CorruptCacheError where it is damaged."""
        return read_record(self.storage, self.manifest, key)

    def codec(self, domain: str) -> TargetCodec:
        """Return what decodes the targets of a domain."""
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
        )

    def read_stored(
        self,
        domain: str,
        split: str,
        rows: Sequence[int] | Array,
        names: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Return (R, …) of the named arrays, or of all, as stored, in the order asked for."""
        domains = [domain] * len(rows)
        if len(rows):  # so that a lie about sizes is found before memory is taken for it
            first = self._keys(split, domains[:1], [int(rows[0])], tuple(names or self.spec.arrays))
            self._chunks(first)
        out = self.buffers(len(rows), names)
        self.fill(split, domains, rows, out)
        return out

    def buffers(self, rows: int, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Return room for (R, …) of the named arrays, or of all, to be filled."""
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

        Only the arrays that are in `out` are read. `out` may be used again and again.

        Raises:
            MismatchError: the cache cannot be read at this temperature.
            InputError: a number is of no valid row.
            UnfinishedCacheError: the shard of a row is not committed.
            CorruptCacheError: stored bytes are not those that were committed.
        """
        arrays, targets, size = tuple(out), list(out.values()), self.spec.chunk_rows
        for first in range(0, len(rows), ROWS_AT_ONCE):
            piece = slice(first, first + ROWS_AT_ONCE)
            numbers = [int(row) for row in rows[piece]]
            chunks = self._chunks(self._keys(split, domains[piece], numbers, arrays))
            for place, (row, chunk) in enumerate(zip(numbers, chunks, strict=True), first):
                offset = row % size
                for target, array in zip(targets, chunk.arrays, strict=True):
                    target[place] = array[offset]

    def _keys(
        self, split: str, domains: Sequence[str], rows: Sequence[int], arrays: tuple[str, ...]
    ) -> list[ChunkKey]:
        """Return the chunk of each row."""
        size = self.spec.chunk_rows
        for domain, row in zip(domains, rows, strict=True):
            self._check_valid(domain, split, row)
        return [
            ChunkKey(domain, split, row // size, arrays)
            for domain, row in zip(domains, rows, strict=True)
        ]

    def _check_valid(self, domain: str, split: str, row: int) -> None:
        runs = self._extents.get((domain, split)) or self.extents(domain, split)
        run = bisect_right(runs, row, key=lambda extent: extent.start) - 1
        if run < 0 or row >= runs[run].start + runs[run].rows:
            raise InputError(
                f"{self.where}: {domain}/{split} has no row {row}; it has "
                f"{self.plan(domain).rows(split):,} rows."
            )


def object_sizes(cache: Cache) -> dict[str, int]:
    """Return the committed bytes of each array, over all domains and splits."""
    sizes = dict.fromkeys(cache.spec.arrays, 0)
    for domain in cache.domains:
        for split in SPLITS:
            for record in cache.records(domain, split):
                for name, entry in record.objects.items():
                    sizes[name] += entry.bytes
    return sizes
