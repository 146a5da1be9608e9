"""The commit record of a shard: that it is complete, and what it must contain.

A record is written after everything it describes and is the only sign that a shard exists. Each
shard has its own, so that a cache grows without a list that must be rewritten; the price is one
more file per shard, read when the shard is first used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddk_cache.errors import CorruptCacheError
from ddk_cache.format.audit_summary import sound
from ddk_cache.format.documents import dump, parse, typed, understand
from ddk_cache.format.layout import record_name, records_name
from ddk_cache.format.manifest import Manifest
from ddk_cache.format.plan import ShardKey, shard_at
from ddk_cache.storage.base import Storage
from ddk_cache.types import Array


@dataclass(frozen=True)
class Object:
    """One committed file: a shard of one array."""

    bytes: int
    hash: str
    """xxh3-128 of the file."""
    chunks: str
    """The crc32c of each chunk, eight hex digits each: a chunk is read only if it has it, so that
    a good shard in the wrong place is noticed without reading it as a whole."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """That one shard is complete: written last, and only then is the shard read."""

    key: ShardKey
    fingerprint: str
    """Fingerprint of the spec that the shard was built under; see `Manifest.spec_of`."""
    content: str
    """Hash of the documents of the portion that its rows come from."""
    rows: int
    """Valid rows; the rest of the shard is padding."""
    positions: int
    """Positions where the loss counts."""
    teacher_loss: float
    """Sum over those positions of the teacher's −log p(true token), nats, before rounding."""
    batch_rows: int
    """Rows that the teacher scored in one call."""
    audit: Mapping[str, Any]
    """Statistics taken while it was written; see `ddk_cache.build.audit`."""
    objects: Mapping[str, Object]
    """Array → its file."""

    def dump(self) -> bytes:
        """Return the bytes of the record."""
        body = {
            "shard": list(self.key),
            "fingerprint": self.fingerprint,
            "content": self.content,
            "rows": self.rows,
            "positions": self.positions,
            "teacher_loss": self.teacher_loss,
            "batch_rows": self.batch_rows,
            "audit": dict(self.audit),
            "objects": {name: vars(entry) for name, entry in self.objects.items()},
        }
        return dump(body)

    def write(self, storage: Storage) -> None:
        """Write the record; from now on the shard is committed.

        An existing record stays: another process made the same shard, and the same record.
        """
        storage.put_if_absent(record_name(self.key), self.dump())


def read_records(
    storage: Storage, manifest: Manifest, keys: Sequence[ShardKey]
) -> Iterator[Record]:
    """Yield the records of planned shards, asked for together. Raises as `read_record` does."""
    found = storage.get_many(map(record_name, keys))
    for key, data in zip(keys, found, strict=True):
        yield parse_record(data, storage.uri(record_name(key)), manifest, key)


def read_record(storage: Storage, manifest: Manifest, key: ShardKey) -> Record:
    """Read the record of a planned shard.

    Raises:
        CorruptCacheError: it is missing, damaged, or of another shard, plan or cache.
    """
    return next(read_records(storage, manifest, [key]))


def parse_record(data: bytes | None, where: str, manifest: Manifest, key: ShardKey) -> Record:
    """Return the record in a document found at `where`; see `read_record` for the errors."""
    if data is None:
        raise CorruptCacheError(f"{where} cannot be read: it is missing.")
    spec, body = manifest.spec, parse(data, where)

    def build() -> Record:
        return Record(
            key=ShardKey(*body["shard"]),
            fingerprint=typed(body["fingerprint"], str),
            content=typed(body["content"], str),
            rows=typed(body["rows"], int, 1),
            positions=typed(body["positions"], int, 0, planned.rows * spec.seq_len),
            teacher_loss=typed(body["teacher_loss"], float, -1, 1e6 * body["positions"]),
            batch_rows=typed(body["batch_rows"], int, 1),
            audit=sound(
                body["audit"], planned.rows * spec.seq_len, all_seen=spec.packing == "stream"
            ),
            objects={
                name: Object(
                    bytes=typed(body["objects"][name]["bytes"], int, 0),
                    hash=typed(body["objects"][name]["hash"], str),
                    chunks=typed(body["objects"][name]["chunks"], str),
                )
                for name in spec.arrays
            },
        )

    planned = shard_at(manifest.plans[key.domain], key.split, spec.shard_rows, key.number)
    record: Record = understand(where, build)
    if (record.key, record.fingerprint, record.rows, record.content) != (
        *(key, manifest.spec_of(key.domain).fingerprint),
        *planned,
    ):
        raise CorruptCacheError(f"{where} is the record of another shard or cache ({record.key}).")
    if {len(entry.chunks) for entry in record.objects.values()} != {8 * spec.chunks_per_shard}:
        raise CorruptCacheError(f"{where} is damaged: checksums are missing.")
    return record


def committed(storage: Storage, domain: str, split: str) -> Iterator[int]:
    """Yield the numbers of the committed shards of a split, by their records' names, in no order.

    No list of names is held: a large cache has a hundred thousand.
    """
    for name in storage.list_prefix(folder := records_name(domain, split)):
        number, _, kind = name.removeprefix(f"{folder}/").partition(".")
        if kind == "json" and number.isascii() and number.isdecimal():
            yield int(number)


def uncommitted(
    storage: Storage, manifest: Manifest, domains: Collection[str] | None = None
) -> list[ShardKey]:
    """Return the planned shards of some domains, or of all, that are not committed, in order."""
    keys = manifest.shards(domains)
    done = {pair: set(committed(storage, *pair)) for pair in {key[:2] for key in keys}}
    return [key for key in keys if key.number not in done[key[:2]]]


def committed_of(storage: Storage, domain: str, split: str, planned: int) -> Array:
    """Return which of the planned shards of a split are committed, (shards) bool.

    Where names cannot be listed, each record is asked for.

    Raises:
        CorruptCacheError: there is a record of a shard that is not planned.
    """
    if not storage.lists:
        names = [record_name(ShardKey(domain, split, number)) for number in range(planned)]
        return np.fromiter(storage.exist_many(names), bool, planned)
    there = np.zeros(planned, bool)
    for number in committed(storage, domain, split):
        if number >= planned:
            raise CorruptCacheError(
                f"{storage.uri()}: there is a record of shard {domain}/{split}/{number}, "
                f"but {planned} shards are planned."
            )
        there[number] = True
    return there
