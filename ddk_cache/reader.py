"""Committed shards → rows, straight from the files.

A direct reader of the one Zarr layout that we write: the index of a shard is parsed once, a chunk
is one `pread`, a checksum and one decompression. That is a few times less work for each token
than a general Zarr reader needs, which asks for the index anew at every read; any Zarr reader
still opens the same files. Only committed shards are read: what is missing is a named error,
never Zarr's silent fill value.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import google_crc32c
import numcodecs.blosc
import numpy as np

from ddk_cache.codec import LogprobCodec
from ddk_cache.manifest import TOKENIZER, Manifest, Record, committed, object_path
from ddk_cache.schema import (
    SPLITS,
    Array,
    CacheSpec,
    CorruptCacheError,
    DomainPlan,
    Extent,
    InputError,
    Rows,
    ShardKey,
    UnfinishedCacheError,
    extents,
    shards,
    unknown,
)

CHUNKS_KEPT = 256
"""Decoded chunks held in memory, so that rows of one chunk drawn soon after cost one read."""

SHARDS_KEPT = 1024
"""Shard indices held in memory."""


def open_cache(path: str | Path, *, unfinished: bool = False) -> Cache:
    """Open a cache for reading. It needs nothing but the path.

    Raises:
        NotACacheError, FormatVersionError, CorruptCacheError: see `Manifest.read`.
        UnfinishedCacheError: not every planned row is committed, unless `unfinished` is true.
    """
    root = Path(path)
    cache = Cache(root, Manifest.read(root))
    if not unfinished:
        cache.require_finished()
    return cache


class Cache:
    """A cache on disk. Rows have the number that they have in the Zarr arrays."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest
        self.codec = LogprobCodec(manifest.spec.logprob_step)
        self._index = lru_cache(SHARDS_KEPT)(self._read_index)
        self._chunk = lru_cache(CHUNKS_KEPT)(self._read_chunk)

    @property
    def spec(self) -> CacheSpec:
        """Return what the cache is."""
        return self.manifest.spec

    @property
    def domains(self) -> list[str]:
        """Return the names of the domains, sorted."""
        return sorted(self.manifest.plans)

    @property
    def tokenizer_path(self) -> Path:
        """Return the directory of the tokenizer's own files."""
        return self.root / TOKENIZER

    def plan(self, domain: str) -> DomainPlan:
        """Return the planned rows of a domain. Raises InputError where it is unknown."""
        if domain not in self.manifest.plans:
            raise InputError(f"{self.root}: {unknown('domain', domain, self.domains)}")
        return self.manifest.plans[domain]

    def extents(self, domain: str, split: str) -> list[Extent]:
        """Return where the valid rows of a split lie."""
        return extents(self.plan(domain), split, self.spec.shard_rows)

    def row_numbers(self, domain: str, split: str) -> Array:
        """Return the numbers of all valid rows of a split, ascending, int64."""
        runs = [np.arange(e.start, e.start + e.rows) for e in self.extents(domain, split)]
        return np.concatenate([np.empty(0, np.int64), *runs])

    @cached_property
    def _committed(self) -> dict[tuple[str, str], set[int]]:
        return {
            (domain, split): committed(self.root, domain, split)
            for domain in self.domains
            for split in SPLITS
        }

    def shard_rows(self, domain: str, split: str) -> list[int]:
        """Return the number of valid rows of every planned shard of a split."""
        return shards(self.plan(domain), split, self.spec.shard_rows)

    def committed_rows(self, domain: str, split: str) -> int:
        """Return the number of valid rows in committed shards."""
        done = self._committed[domain, split]
        return sum(
            rows for index, rows in enumerate(self.shard_rows(domain, split)) if index in done
        )

    def require_finished(self) -> None:
        """Raise UnfinishedCacheError unless every row of every domain is committed."""
        missing = sorted(set(self.manifest.sources) - set(self.manifest.plans))
        again = "Run the same 'ddk-cache build' again to go on."
        if missing:
            raise UnfinishedCacheError(
                f"{self.root} is not finished: the rows of {', '.join(missing)} are not planned "
                f"yet. {again}"
            )
        pairs = [(domain, split) for domain in self.domains for split in SPLITS]
        done = sum(self.committed_rows(*pair) for pair in pairs)
        total = sum(self.plan(domain).rows(split) for domain, split in pairs)
        if done < total:
            raise UnfinishedCacheError(
                f"{self.root} is not finished: {done:,} of {total:,} rows are committed. {again}"
            )

    def committed(self, domain: str, split: str) -> list[int]:
        """Return the numbers of the committed shards of a split, ascending."""
        return sorted(self._committed[domain, split])

    def records(self, domain: str, split: str) -> Iterator[Record]:
        """Yield the commit records of a split, each checked against the spec."""
        for index in self.committed(domain, split):
            yield self.record(ShardKey(domain, split, index))

    def teacher_loss(self, domain: str, split: str) -> tuple[float, int]:
        """Return the teacher's summed loss (nats) over a split and the positions counted."""
        records = list(self.records(domain, split))
        return sum(r.teacher_loss for r in records), sum(r.positions for r in records)

    def read(self, domain: str, split: str, rows: Sequence[int] | Array) -> Rows:
        """Read rows by number, in the order asked for.

        Raises:
            InputError: a number is of no valid row.
            UnfinishedCacheError: the shard of a row is not committed.
            CorruptCacheError: stored bytes fail their checksum.
        """
        numbers = np.asarray(rows, np.int64)
        self._check_valid(domain, split, numbers)
        raw = {
            name: np.empty((len(numbers), *layout.inner), layout.dtype)
            for name, layout in self.spec.arrays.items()
        }
        chunks, offsets = np.divmod(numbers, self.spec.chunk_rows)
        for chunk in np.unique(chunks):
            here = chunks == chunk
            for name, data in self._chunk(domain, split, int(chunk)).items():
                raw[name][here] = data[offsets[here]]
        return Rows(
            tokens=raw["tokens"].astype(np.int64),
            targets=self.codec.targets(
                raw["target_ids"], raw["target_logprobs"], raw["tail_logprob"]
            ),
            label_logprob=self.codec.decode(raw["label_logprob"]),
            loss_mask=raw["loss_mask"].astype(bool),
        )

    def _check_valid(self, domain: str, split: str, numbers: Array) -> None:
        valid = np.zeros(len(numbers), bool)
        for start, rows in self.extents(domain, split):
            valid |= (start <= numbers) & (numbers < start + rows)
        if not valid.all():
            raise InputError(
                f"{self.root}: {domain}/{split} has no row {numbers[~valid][0]}; it has "
                f"{self.plan(domain).rows(split):,} rows."
            )

    def record(self, key: ShardKey) -> Record:
        """Return the commit record of a shard. Raises CorruptCacheError where it is damaged."""
        record = Record.read(self.root, key)
        if record.fingerprint != self.spec.fingerprint:
            raise CorruptCacheError(f"the record of shard {key} belongs to another cache.")
        return record

    def _read_chunk(self, domain: str, split: str, chunk: int) -> dict[str, Array]:
        """Return one chunk of every array, as stored."""
        shard, place = divmod(chunk, self.spec.shard_rows // self.spec.chunk_rows)
        key = ShardKey(domain, split, shard)
        if shard not in self._committed[domain, split]:
            raise UnfinishedCacheError(
                f"{self.root}: shard {key} is not committed. Run the same 'ddk-cache build' "
                "again to go on."
            )
        out = {}
        for name, layout in self.spec.arrays.items():
            path = object_path(self.root, self.spec, key, name)
            offset, length = self._index(path)[place]
            data = _unwrap(_pread(path, int(offset), int(length)), path)
            shape = (self.spec.chunk_rows, *layout.inner)
            try:
                flat = np.frombuffer(numcodecs.blosc.decompress(data), layout.dtype)
                out[name] = flat.reshape(shape)
            except (RuntimeError, ValueError) as error:
                raise CorruptCacheError(f"chunk {place} of {path} is damaged: {error}") from error
        return out

    def _read_index(self, path: Path) -> Array:
        """Return (chunks, 2) offsets and lengths: the footer of a shard."""
        count = self.spec.shard_rows // self.spec.chunk_rows
        size = path.stat().st_size if path.exists() else 0
        length = 16 * count + 4
        if size < length:
            raise CorruptCacheError(f"{path} is missing or cut short ({size:,} bytes).")
        footer = _unwrap(_pread(path, size - length, length), path)
        index = np.frombuffer(footer, "<u8").reshape(count, 2)
        if (index > size).any() or (index.sum(1) > size).any():
            raise CorruptCacheError(f"the index of {path} points outside of the file.")
        return index


def _pread(path: Path, offset: int, length: int) -> bytes:
    handle = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(handle, length, offset)
    finally:
        os.close(handle)
    if len(data) != length:
        raise CorruptCacheError(f"{path} is cut short: {len(data):,} of {length:,} bytes.")
    return data


def _unwrap(data: bytes, path: Path) -> bytes:
    """Check the four bytes that the crc32c codec appends, and return the rest."""
    body, stored = data[:-4], int.from_bytes(data[-4:], "little")
    if google_crc32c.value(body) != stored:
        raise CorruptCacheError(
            f"{path} is damaged: checksum {google_crc32c.value(body):08x}, stored {stored:08x}."
        )
    return body


def object_sizes(cache: Cache) -> dict[str, int]:
    """Return the committed bytes of each array, over all domains and splits."""
    sizes = dict.fromkeys(cache.spec.arrays, 0)
    for domain in cache.domains:
        for split in SPLITS:
            for record in cache.records(domain, split):
                for path, (size, _) in record.objects.items():
                    sizes[path.split("/")[3]] += size
    return sizes
