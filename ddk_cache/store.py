"""Arrays on disk: create, write whole shards, commit. The only file that knows zarr.

zarr-python writes each object to a temporary file and renames it, but does not flush, and reads
the old object before it replaces one; so every object is removed first, flushed and hashed after,
and named in a record last. Everything is written in whole, padded shards: no writer ever shares
an object with another, and a torn one is never read.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from ddk_cache import files
from ddk_cache.codec import LogprobCodec
from ddk_cache.manifest import Record, object_path
from ddk_cache.schema import Array, ArrayLayout, CacheSpec, CorruptCacheError, ShardKey

TOKEN_ARRAYS = ("tokens", "loss_mask")
"""Written when the rows are planned; the other arrays wait for the teacher."""

STORED_WHOLE: Any = {"write_empty_chunks": True}
"""Chunks equal to the fill value are stored too: a missing one must mean a missing one. Zarr keeps
this with the handle and not with the array, so it is given at every opening."""


class Store:
    """The arrays of one cache, for writing."""

    def __init__(self, root: Path, spec: CacheSpec) -> None:
        self.root = root
        self.spec = spec
        self.codec = LogprobCodec(spec.logprob_step)

    def allocate(self, domain: str, split: str, count: int, names: Iterable[str]) -> None:
        """Give the named arrays of a split room for `count` shards; bytes there stay."""
        for name in names:
            layout = self.spec.arrays[name]
            shape = (count * self.spec.shard_rows, *layout.inner)
            path = self._path(domain, split, name)
            if (path / "zarr.json").exists():
                array = zarr.open_array(path, mode="r+")
                if array.shape != shape:
                    array.resize(shape)
            else:
                self._create(path, layout, shape, name)

    def write(self, key: ShardKey, arrays: Mapping[str, Array]) -> None:
        """Write one shard of each named array: (rows ≤ shard_rows, …), padded with the fill."""
        for name, data in arrays.items():
            layout = self.spec.arrays[name]
            whole = np.full((self.spec.shard_rows, *layout.inner), layout.fill, layout.dtype)
            whole[: len(data)] = data
            path = self._object(key, name)
            path.unlink(missing_ok=True)
            start = key.number * self.spec.shard_rows
            array = self._open(key, name)
            array[start : start + self.spec.shard_rows] = whole
            files.sync(path)
            files.sync(path.parent)

    def read(self, key: ShardKey, name: str, rows: int) -> Array:
        """Return the first `rows` rows of a shard that was written, committed or not.

        Raises:
            CorruptCacheError: the shard is missing or its checksum fails.
        """
        if not self._object(key, name).exists():
            raise CorruptCacheError(f"{self._object(key, name)} is missing.")
        start = key.number * self.spec.shard_rows
        try:
            return np.asarray(self._open(key, name)[start : start + rows])
        except (ValueError, RuntimeError) as error:
            raise CorruptCacheError(f"{self._object(key, name)} is damaged: {error}") from error

    def commit(self, key: ShardKey, *, rows: int, positions: int, teacher_loss: float) -> Record:
        """Hash the objects of a shard and write its record."""
        paths = [self._object(key, name) for name in self.spec.arrays]
        record = Record(
            key=key,
            fingerprint=self.spec.fingerprint,
            rows=rows,
            positions=positions,
            teacher_loss=teacher_loss,
            objects={str(path.relative_to(self.root)): files.hash_file(path) for path in paths},
        )
        record.write(self.root)
        return record

    def clear(self, domain: str) -> None:
        """Remove the arrays of a domain whose rows are not planned yet."""
        shutil.rmtree(self.root / "domains" / domain, ignore_errors=True)

    def sweep(self) -> None:
        """Remove the temporary files of a process that was killed."""
        for path in self.root.rglob(f"*{files.PARTIAL}"):
            path.unlink(missing_ok=True)

    def _path(self, domain: str, split: str, name: str) -> Path:
        return self.root / "domains" / domain / split / name

    def _object(self, key: ShardKey, name: str) -> Path:
        return object_path(self.root, self.spec, key, name)

    def _open(self, key: ShardKey, name: str) -> zarr.Array[Any]:
        path = self._path(key.domain, key.split, name)
        return zarr.open_array(path, mode="r+").with_config(STORED_WHOLE)

    def _create(self, path: Path, layout: ArrayLayout, shape: tuple[int, ...], name: str) -> None:
        typesize = layout.dtype.itemsize
        blosc = BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=typesize)
        zarr.create_array(
            self.root,
            name=str(path.relative_to(self.root)),
            shape=shape,
            chunks=(self.spec.chunk_rows, *layout.inner),
            shards=(self.spec.shard_rows, *layout.inner),
            dtype=layout.dtype,
            fill_value=layout.dtype.type(layout.fill),
            compressors=[blosc, Crc32cCodec()],
            attributes=self.codec.attributes() if name.endswith(("logprob", "logprobs")) else {},
            dimension_names=("row", "position", "entry")[: len(shape)],
            config=STORED_WHOLE,
        )
