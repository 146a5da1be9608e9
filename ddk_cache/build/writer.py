"""Arrays on disk: create them, write and read whole shards. The only module that imports zarr.

Every object is made as a local file of the process, hashed, and then put into the storage, so it
is whole wherever it can be seen; zarr-python alone would not flush, and would read the old object
first. Everything is written in whole, padded shards: no writer ever shares an object with another,
and two that make the same shard make the same bytes. The price is a rename and a flush for each
object in a directory, or one request in an object store.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from ddk_cache.errors import CorruptCacheError
from ddk_cache.format.codec import TargetCodec
from ddk_cache.format.commit import Object
from ddk_cache.format.layout import (
    DOMAINS,
    document_name,
    group_name,
    object_name,
    records_name,
    shards_name,
)
from ddk_cache.format.plan import DomainPlan, ShardKey, extents, shard_count
from ddk_cache.format.spec import CacheSpec
from ddk_cache.format.zarr_shard import checksums, decode
from ddk_cache.hashing import digest
from ddk_cache.storage.base import Storage
from ddk_cache.types import SPLITS, Array

COMPRESSORS: dict[str, Any] = {
    "small": {"cname": "zstd", "clevel": 5},
    "fast": {"cname": "lz4", "clevel": 5},
}
"""Blosc's settings. Its level 9 is zstd's 22: ten times the work for a fiftieth of the bytes."""

STORED_WHOLE: Any = {"write_empty_chunks": True}
"""Chunks equal to the fill value are stored too, so that a missing chunk is an error. Zarr keeps
this with the handle and not with the array, so it is given at every opening."""


class Stored(NamedTuple):
    """One shard of an array, read back."""

    rows: Array
    """(R, …) its valid rows."""
    object: Object
    """What its record says of it."""


def group(**attributes: Any) -> str:
    """Return the text of the document of a Zarr group."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1)


def shuffle_of(spec: CacheSpec, name: str) -> Literal["noshuffle", "bitshuffle"]:
    """Return how blosc puts the values of an array: zstd finds more in bytes as they are."""
    plain = name == "tokens" or spec.arrays[name].dtype.itemsize == 1
    return "noshuffle" if plain and spec.compression == "small" else "bitshuffle"


class ShardWriter:
    """The arrays of one cache, for writing."""

    def __init__(self, storage: Storage, spec: CacheSpec) -> None:
        self.storage, self.spec = storage, spec
        self.codec = TargetCodec(spec)
        self._shards: dict[str, Any] = {}
        """Array → an array of one shard in the scratch folder, whose object is moved away."""

    # --- Zarr's documents ---

    def metadata(self, domain: str, plan: DomainPlan) -> dict[str, str]:
        """Return path → text of the Zarr documents that a plan calls for."""
        named = group(frequent_ids=list(plan.frequent_ids))
        documents = {
            document_name(DOMAINS): group(),
            document_name(group_name(domain)): named,
        }
        for split in SPLITS:
            valid = [list(extent) for extent in extents(plan, split, self.spec.shard_rows)]
            documents[document_name(group_name(domain, split))] = group(valid_rows=valid)
            count = shard_count(plan, split, self.spec.shard_rows)
            for name in self.spec.arrays:
                path = self.storage.scratch / "metadata" / name
                self._create(path, name, max(count, 1))
                text = (path / "zarr.json").read_text()
                documents[document_name(group_name(domain, split, name))] = text
        return documents

    def restore_metadata(self, plan: DomainPlan) -> None:
        """Write the Zarr documents of a plan where they are missing or changed."""
        for name, text in plan.metadata.items():
            if self.storage.get(name) != text.encode():
                self.storage.put(name, text.encode())

    # --- shards ---

    def write(self, key: ShardKey, arrays: Mapping[str, Array]) -> dict[str, Object]:
        """Write one shard of each named array; return what its record says of each.

        The arrays are (R ≤ shard_rows, …); they are padded with the fill value.
        """
        objects = {}
        for name, data in arrays.items():
            layout = self.spec.arrays[name]
            whole = np.full((self.spec.shard_rows, *layout.inner), layout.fill, layout.dtype)
            whole[: len(data)] = data
            path = self.storage.scratch / "shards" / name
            if name not in self._shards:
                self._shards[name] = self._create(path, name, 1)
            self._shards[name][:] = whole
            made = path.joinpath("c", *["0"] * (1 + len(layout.inner)))
            objects[name] = self._describe(made.read_bytes(), str(made))
            self.storage.put_file(made, object_name(self.spec, key, name))
        return objects

    def read(self, key: ShardKey, name: str, rows: int) -> Stored:
        """Return the first `rows` rows of a shard that was written, committed or not.

        Raises:
            CorruptCacheError: the shard is missing or its checksum fails.
        """
        object_ = object_name(self.spec, key, name)
        where, data = self.storage.uri(object_), self.storage.get(object_)
        if data is None:
            raise CorruptCacheError(f"{where} is missing.")
        self.storage.check_size(object_, len(data))
        layout = self.spec.arrays[name]
        out = np.empty((self.spec.shard_rows, *layout.inner), layout.dtype)
        decode(data, where, self.spec.chunks_per_shard, out)
        return Stored(out[:rows], self._describe(data, where))

    def missing_tokens(self, domain: str, plan: DomainPlan) -> set[ShardKey]:
        """Return the planned shards of a domain whose token rows are not there."""
        missing = set()
        for split, name in product(SPLITS, self.spec.token_arrays):
            there = set(self.storage.list_prefix(shards_name(domain, split, name)))
            for number in range(shard_count(plan, split, self.spec.shard_rows)):
                key = ShardKey(domain, split, number)
                if object_name(self.spec, key, name) not in there:
                    missing.add(key)
        return missing

    # --- leftovers ---

    def clear(self, domain: str) -> None:
        """Remove all of a domain whose rows are not planned: its records first."""
        for folder in (records_name(domain), group_name(domain)):
            self.storage.delete_dir(folder)

    def _describe(self, data: bytes, where: str) -> Object:
        """Return what the record of a shard says of an object with these bytes."""
        return Object(len(data), digest(data), checksums(data, where, self.spec.chunks_per_shard))

    def _create(self, path: Path, name: str, count: int) -> Any:
        """Create an empty array for `count` shards in the scratch folder."""
        shutil.rmtree(path, ignore_errors=True)
        layout = self.spec.arrays[name]
        blosc = BloscCodec(
            **COMPRESSORS[self.spec.compression],
            shuffle=shuffle_of(self.spec, name),
            typesize=layout.dtype.itemsize,
        )
        inner = layout.inner
        return zarr.create_array(
            path,
            shape=(count * self.spec.shard_rows, *inner),
            chunks=(self.spec.chunk_rows, *inner),
            shards=(self.spec.shard_rows, *inner),
            dtype=layout.dtype,
            fill_value=layout.dtype.type(layout.fill),
            compressors=[blosc, Crc32cCodec()],
            attributes=self.codec.attributes(name),
            dimension_names=("row", *layout.axes),
            config=STORED_WHOLE,
        )
