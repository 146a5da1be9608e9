"""Arrays on disk: create, write whole shards, commit. The only file that knows zarr.

Every object is made in a folder of the process, flushed, and renamed into its place, so it is
whole wherever it can be seen; zarr-python alone would rename too, but not flush, and would read
the old object first. Everything is written in whole, padded shards: no writer ever shares an
object with another, and two that make the same shard make the same bytes. The price is a rename
and a flush for each object.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from ddk_cache import files, process
from ddk_cache.codec import TargetCodec
from ddk_cache.manifest import COMMITS
from ddk_cache.objects import Folder
from ddk_cache.records import Object, Record, object_path
from ddk_cache.schema import (
    SPLITS,
    Array,
    CacheSpec,
    CorruptCacheError,
    DomainPlan,
    ShardKey,
    shard_count,
)
from ddk_cache.shards import checksums

TOKEN_ARRAYS = ("tokens", "loss_mask")
"""Written when the rows are planned; the other arrays wait for the teacher."""

SCRATCH = "tmp"

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
    single = spec.arrays[name].dtype.itemsize == 1
    return "noshuffle" if single and spec.compression == "small" else "bitshuffle"


class Store:
    """The arrays of one cache, for writing."""

    def __init__(self, root: Path, spec: CacheSpec) -> None:
        self.root, self.objects = root, Folder(root)
        self.spec = spec
        self.codec = TargetCodec(spec)
        self.scratch = root / SCRATCH / process.owner()

    # --- Zarr's documents ---

    def metadata(self, domain: str, plan: DomainPlan) -> dict[str, str]:
        """Return path → text of the Zarr documents that a plan calls for."""
        named = group(frequent_ids=list(plan.frequent_ids))
        documents = {"domains/zarr.json": group(), f"domains/{domain}/zarr.json": named}
        for split in SPLITS:
            documents[f"domains/{domain}/{split}/zarr.json"] = group()
            count = shard_count(plan, split, self.spec.shard_rows)
            for name in self.spec.arrays:
                path = self.scratch / "metadata" / name
                self._create(path, name, max(count, 1))
                text = (path / "zarr.json").read_text()
                documents[f"domains/{domain}/{split}/{name}/zarr.json"] = text
        return documents

    def restore_metadata(self, plan: DomainPlan) -> None:
        """Write the Zarr documents of a plan where they are missing or changed."""
        for name, text in plan.metadata.items():
            path = self.root / name
            if not path.exists() or path.read_bytes() != text.encode():
                path.parent.mkdir(parents=True, exist_ok=True)
                files.replace(path, text.encode())

    # --- shards ---

    def write(self, key: ShardKey, arrays: Mapping[str, Array]) -> None:
        """Write one shard of each named array: (rows ≤ shard_rows, …), padded with the fill."""
        for name, data in arrays.items():
            layout = self.spec.arrays[name]
            whole = np.full((self.spec.shard_rows, *layout.inner), layout.fill, layout.dtype)
            whole[: len(data)] = data
            path = self.scratch / "shards" / name
            self._create(path, name, 1)[:] = whole
            made = path.joinpath("c", *["0"] * (1 + len(layout.inner)))
            files.sync(made)
            final = object_path(self.root, self.spec, key, name)
            final.parent.mkdir(parents=True, exist_ok=True)
            made.replace(final)
            files.sync(final.parent)

    def read(self, key: ShardKey, name: str, rows: int) -> Array:
        """Return the first `rows` rows of a shard that was written, committed or not.

        Raises:
            CorruptCacheError: the shard is missing or its checksum fails.
        """
        path = object_path(self.root, self.spec, key, name)
        if not path.exists():
            raise CorruptCacheError(f"{path} is missing.")
        start = key.number * self.spec.shard_rows
        try:
            array = zarr.open_array(self._array(key.domain, key.split, name), mode="r")
            return np.asarray(array[start : start + rows])
        except (ValueError, RuntimeError) as error:
            raise CorruptCacheError(f"{path} is damaged: {error}") from error

    def commit(self, key: ShardKey, **facts: Any) -> Record:
        """Hash the objects of a shard and write its record; `facts` are its other fields."""
        objects = {}
        for name in self.spec.arrays:
            path = object_path(self.root, self.spec, key, name)
            size, hashed = files.hash_file(path)
            chunks = checksums(path, self.spec.chunks_per_shard)
            objects[name] = Object(size, hashed, chunks)
        record = Record(key=key, fingerprint=self.spec.fingerprint, objects=objects, **facts)
        record.write(self.objects, self.spec.format_version)
        return record

    def missing_tokens(self, domain: str, plan: DomainPlan) -> set[ShardKey]:
        """Return the planned shards of a domain whose token rows are not there."""
        return {
            key
            for split in SPLITS
            for number in range(shard_count(plan, split, self.spec.shard_rows))
            for key in [ShardKey(domain, split, number)]
            if not all(self._there(key, name) for name in TOKEN_ARRAYS)
        }

    # --- leftovers ---

    def clear(self, domain: str) -> None:
        """Remove all of a domain whose rows are not planned: its records first."""
        for folder in (COMMITS, "domains"):
            shutil.rmtree(self.root / folder / domain, ignore_errors=True)

    def sweep(self) -> None:
        """Remove the scratch of this process and of those that died."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        folder = self.root / SCRATCH
        for path in folder.iterdir() if folder.is_dir() else []:
            if not process.alive(path.name, path):
                shutil.rmtree(path, ignore_errors=True)

    def _there(self, key: ShardKey, name: str) -> bool:
        return object_path(self.root, self.spec, key, name).exists()

    def _array(self, domain: str, split: str, name: str) -> Path:
        return self.root / "domains" / domain / split / name

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
