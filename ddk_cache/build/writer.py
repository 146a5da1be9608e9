"""Arrays on disk: create, write whole shards, commit. The only file that knows zarr.

Every object is made as a local file of the process and handed over to the place where the cache
lies, so it is whole wherever it can be seen; zarr-python alone would not flush, and would read the
old object first. Everything is written in whole, padded shards: no writer ever shares an object
with another, and two that make the same shard make the same bytes. The price is a rename and a
flush for each object in a directory, or one request; and reading it once more for its record.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from ddk_cache.errors import CorruptCacheError
from ddk_cache.format.codec import TargetCodec
from ddk_cache.format.commit import Object, Record
from ddk_cache.format.layout import COMMITS, object_name
from ddk_cache.format.plan import DomainPlan, ShardKey, shard_count
from ddk_cache.format.spec import CacheSpec
from ddk_cache.format.zarr_shard import checksums, decode
from ddk_cache.hashing import digest
from ddk_cache.storage.base import Storage
from ddk_cache.types import SPLITS, Array

TOKEN_ARRAYS = ("tokens", "loss_mask")
"""Written when the rows are planned; the other arrays wait for the teacher."""

COMPRESSORS: dict[str, Any] = {
    "small": {"cname": "zstd", "clevel": 5},
    "fast": {"cname": "lz4", "clevel": 5},
}
"""In blosc's levels; its 9 is zstd's 22, ten times the work for a fiftieth of the bytes."""

STORED_WHOLE: Any = {"write_empty_chunks": True}
"""Chunks equal to the fill value are stored too: a missing one must mean a missing one. Zarr keeps
this with the handle and not with the array, so it is given at every opening."""


def group(**attributes: Any) -> str:
    """Return the document of a Zarr group."""
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

    # --- Zarr's documents ---

    def metadata(self, domain: str, plan: DomainPlan) -> dict[str, str]:
        """Return path → text of the Zarr documents that a plan calls for."""
        named = group(frequent_ids=list(plan.frequent_ids))
        documents = {"domains/zarr.json": group(), f"domains/{domain}/zarr.json": named}
        for split in SPLITS:
            documents[f"domains/{domain}/{split}/zarr.json"] = group()
            count = shard_count(plan, split, self.spec.shard_rows)
            for name in self.spec.arrays:
                path = self.storage.scratch / "metadata" / name
                self._create(path, name, max(count, 1))
                text = (path / "zarr.json").read_text()
                documents[f"domains/{domain}/{split}/{name}/zarr.json"] = text
        return documents

    def restore_metadata(self, plan: DomainPlan) -> None:
        """Write the Zarr documents of a plan where they are missing or changed."""
        for name, text in plan.metadata.items():
            if self.storage.get(name) != text.encode():
                self.storage.put(name, text.encode())

    # --- shards ---

    def write(self, key: ShardKey, arrays: Mapping[str, Array]) -> None:
        """Write one shard of each named array: (rows ≤ shard_rows, …), padded with the fill."""
        for name, data in arrays.items():
            layout = self.spec.arrays[name]
            whole = np.full((self.spec.shard_rows, *layout.inner), layout.fill, layout.dtype)
            whole[: len(data)] = data
            path = self.storage.scratch / "shards" / name
            self._create(path, name, 1)[:] = whole
            made = path.joinpath("c", *["0"] * (1 + len(layout.inner)))
            self.storage.put_file(made, object_name(self.spec, key, name))

    def read(self, key: ShardKey, name: str, rows: int) -> Array:
        """Return the first `rows` rows of a shard that was written, committed or not.

        Raises:
            CorruptCacheError: the shard is missing or its checksum fails.
        """
        data, where = self._shard(key, name)
        layout = self.spec.arrays[name]
        out = np.empty((self.spec.shard_rows, *layout.inner), layout.dtype)
        decode(data, where, self.spec.chunks_per_shard, out)
        return out[:rows]

    def commit(self, key: ShardKey, **facts: Any) -> Record:
        """Hash the objects of a shard and write its record; `facts` are its other fields."""
        objects = {}
        for name in self.spec.arrays:
            data, where = self._shard(key, name)
            chunks = checksums(data, where, self.spec.chunks_per_shard)
            objects[name] = Object(len(data), digest(data), chunks)
        record = Record(key=key, fingerprint=self.spec.fingerprint, objects=objects, **facts)
        record.write(self.storage)
        return record

    def missing_tokens(self, domain: str, plan: DomainPlan) -> set[ShardKey]:
        """Return the planned shards of a domain whose token rows are not there."""
        missing = set()
        for split, name in product(SPLITS, TOKEN_ARRAYS):
            there = set(self.storage.list_prefix(f"domains/{domain}/{split}/{name}/c"))
            for number in range(shard_count(plan, split, self.spec.shard_rows)):
                key = ShardKey(domain, split, number)
                if object_name(self.spec, key, name) not in there:
                    missing.add(key)
        return missing

    # --- leftovers ---

    def clear(self, domain: str) -> None:
        """Remove all of a domain whose rows are not planned: its records first."""
        for folder in (COMMITS, "domains"):
            self.storage.delete_dir(f"{folder}/{domain}")

    def _shard(self, key: ShardKey, name: str) -> tuple[bytes, str]:
        """Return one shard of an array as bytes, and where it lies, for people."""
        object_ = object_name(self.spec, key, name)
        where, data = self.storage.uri(object_), self.storage.get(object_)
        if data is None:
            raise CorruptCacheError(f"{where} is missing.")
        self.storage.check_size(object_, len(data))
        return data, where

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
