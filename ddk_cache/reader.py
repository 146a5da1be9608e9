"""Committed shards → rows, straight from the files.

A direct reader of the one Zarr layout that we write: the index of a shard is parsed once, a chunk
is one `pread`, a checksum and one decompression. That is a few times less work for each token
than a general Zarr reader needs, which asks for the index anew at every read; any Zarr reader
still opens the same files. Only committed shards are read: what is missing is a named error,
never Zarr's silent fill value.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numcodecs.blosc
import numpy as np

from ddk_cache.codec import Codec, LogprobCodec, codec_of
from ddk_cache.manifest import (
    TOKENIZER,
    Manifest,
    Record,
    committed,
    object_path,
    read_record,
)
from ddk_cache.schema import (
    SPLITS,
    Array,
    CacheSpec,
    CorruptCacheError,
    DomainPlan,
    Extent,
    InputError,
    Rows,
    Shard,
    ShardKey,
    UnfinishedCacheError,
    extents,
    shards,
    unknown,
)
from ddk_cache.shards import Index, index_of

CHUNKS_KEPT = 256
"""Decoded chunks held in memory, so that rows of one chunk drawn soon after cost one read."""

BLOSC_HEADER = struct.Struct("<4xIII")
"""Of a chunk: versions and flags, then bytes before, of a block, and after compression."""

SHARDS_KEPT = 512
"""Records and indices of shards held in memory."""


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
        self.logprob = LogprobCodec(manifest.spec.logprob_step)
        self._committed = self._find_committed()
        self._real = root.resolve()
        self._shard = lru_cache(SHARDS_KEPT)(self._read_shard)
        self._chunk = lru_cache(CHUNKS_KEPT)(self._read_chunk)
        self._codecs: dict[str, Codec] = {}

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

    def _find_committed(self) -> dict[tuple[str, str], set[int]]:
        """Return the numbers of committed shards by domain and split, by their records' names."""
        found = {}
        for domain in self.domains:
            for split in SPLITS:
                numbers = committed(self.root, domain, split)
                planned = len(self.shards(domain, split))
                if numbers and max(numbers) >= planned:
                    raise CorruptCacheError(
                        f"{self.root}: there is a record of shard {domain}/{split}/{max(numbers)}, "
                        f"but {planned} shards are planned."
                    )
                found[domain, split] = numbers
        return found

    def shards(self, domain: str, split: str) -> list[Shard]:
        """Return every planned shard of a split, by number."""
        return shards(self.plan(domain), split, self.spec.shard_rows)

    def committed_rows(self, domain: str, split: str) -> int:
        """Return the number of valid rows in committed shards."""
        done = self._committed[domain, split]
        planned = self.shards(domain, split)
        return sum(shard.rows for number, shard in enumerate(planned) if number in done)

    def committed_row_numbers(self, domain: str, split: str) -> Array:
        """Return the numbers of the rows of committed shards, ascending, int64."""
        rows = self.row_numbers(domain, split)
        return rows[np.isin(rows // self.spec.shard_rows, self.committed(domain, split))]

    def require_finished(self) -> None:
        """Raise UnfinishedCacheError unless every row of every domain is committed."""
        missing = sorted(set(self.manifest.root.sources) - set(self.manifest.plans))
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

    def holds(self, path: Path) -> bool:
        """Return whether a path, its links followed, lies within the cache."""
        return path.resolve().is_relative_to(self._real)

    def is_committed(self, key: ShardKey) -> bool:
        """Return whether a shard has a record."""
        return key.number in self._committed[key.domain, key.split]

    def records(self, domain: str, split: str) -> Iterator[Record]:
        """Yield the commit records of a split, each checked against the spec."""
        for index in self.committed(domain, split):
            yield self.record(ShardKey(domain, split, index))

    def teacher_loss(self, domain: str, split: str) -> tuple[float, int]:
        """Return the teacher's summed loss (nats) over a split and the positions counted."""
        records = list(self.records(domain, split))
        return sum(r.teacher_loss for r in records), sum(r.positions for r in records)

    def codec(self, domain: str) -> Codec:
        """Return what decodes the targets of a domain."""
        if domain not in self._codecs:
            self._codecs[domain] = codec_of(self.spec, self.plan(domain).frequent_ids)
        return self._codecs[domain]

    def read(
        self, domain: str, split: str, rows: Sequence[int] | Array, *, temperature: float = 1.0
    ) -> Rows:
        """Read rows by number, in the order asked for, with the targets at a temperature.

        Raises:
            MismatchError: the cache cannot be read at this temperature.
            InputError: a number is of no valid row.
            UnfinishedCacheError: the shard of a row is not committed.
            CorruptCacheError: stored bytes fail their checksum.
        """
        if temperature != 1:
            self.spec.temperature_place(temperature)
        numbers = np.asarray(rows, np.int64)
        self._check_valid(domain, split, numbers)
        chunks, offsets = np.divmod(numbers, self.spec.chunk_rows)
        if len(chunks):  # so that a lie about sizes is found before memory is taken for it
            self._chunk(domain, split, int(chunks[0]))
        raw = {
            name: np.empty((len(numbers), *layout.inner), layout.dtype)
            for name, layout in self.spec.arrays.items()
        }
        for chunk in np.unique(chunks):
            here = chunks == chunk
            for name, data in self._chunk(domain, split, int(chunk)).items():
                raw[name][here] = data[offsets[here]]
        return Rows(
            tokens=raw["tokens"].astype(np.int64),
            targets=self.codec(domain).targets(raw, temperature),
            label_logprob=self.logprob.decode(raw["label_logprob"]),
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
        return read_record(self.root, self.manifest, key)

    def _read_chunk(self, domain: str, split: str, chunk: int) -> dict[str, Array]:
        """Return one chunk of every array, as stored."""
        number, place = divmod(chunk, self.spec.chunks_per_shard)
        record, indices = self._shard(ShardKey(domain, split, number))
        out = {}
        for name, layout in self.spec.arrays.items():
            index = indices[name]
            data, checksum = index.chunk(place)
            if checksum != record.objects[name].chunks[8 * place : 8 * place + 8]:
                raise CorruptCacheError(f"{index.path} is not the shard that was committed.")
            shape = (self.spec.chunk_rows, *layout.inner)
            size = math.prod(shape) * layout.dtype.itemsize
            flat = np.frombuffer(decompress(data, index.path, size), layout.dtype)
            out[name] = flat.reshape(shape)
        return out

    def _read_shard(self, key: ShardKey) -> tuple[Record, dict[str, Index]]:
        """Return the record of a committed shard, and the index of each of its objects."""
        if not self.is_committed(key):
            raise UnfinishedCacheError(
                f"{self.root}: shard {key} is not committed. Run the same 'ddk-cache build' "
                "again to go on."
            )
        record = self.record(key)
        indices = {}
        for name, entry in record.objects.items():
            path = object_path(self.root, self.spec, key, name)
            if not self.holds(path):
                raise CorruptCacheError(f"{path} leads out of the cache.")
            indices[name] = index_of(path, self.spec.chunks_per_shard)
            if path.stat().st_size != entry.bytes:
                raise CorruptCacheError(
                    f"{path} has {path.stat().st_size:,} bytes, {entry.bytes:,} were committed."
                )
        return record, indices


def decompress(data: bytes, path: Path, size: int) -> bytes:
    """Return the `size` bytes of a chunk, after checking that it claims as many.

    Raises:
        CorruptCacheError: it is no blosc chunk, or of another size.
    """
    try:
        claimed, _, packed = BLOSC_HEADER.unpack_from(data)
        if (claimed, packed) != (size, len(data)):
            raise ValueError(f"it claims {claimed:,} bytes where {size:,} belong")
        return bytes(numcodecs.blosc.decompress(data))
    except (RuntimeError, ValueError, struct.error) as error:
        raise CorruptCacheError(f"a chunk of {path} is damaged: {error}.") from error


def object_sizes(cache: Cache) -> dict[str, int]:
    """Return the committed bytes of each array, over all domains and splits."""
    sizes = dict.fromkeys(cache.spec.arrays, 0)
    for domain in cache.domains:
        for split in SPLITS:
            for record in cache.records(domain, split):
                for name, entry in record.objects.items():
                    sizes[name] += entry.bytes
    return sizes
