"""Readers of the same rows: this project's, the limit, and what a user would pick instead.

Each is a class with `prepare` (once, writes a copy in its own format where it needs one),
`__init__` (opens) and `read` (the stored integers of some rows, in memory). None shuffles or
decodes values, so what is compared is the way from a file to an array.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benches.material import DOMAIN
from ddk_cache.format.layout import object_name
from ddk_cache.format.plan import ShardKey
from ddk_cache.read.cache import Cache, open_cache
from ddk_cache.types import SPLITS

TRAIN = SPLITS[0]

ROWS_PER_SHARD = 64
"""Of the formats of others: about what they recommend in bytes, and as many rows as ours."""


class Engine(Protocol):
    """A way to read rows."""

    def __init__(self, cache: Path, copy: Path) -> None: ...

    @staticmethod
    def prepare(cache: Path, copy: Path) -> None:
        """Write what the engine reads."""

    def read(self, rows: Sequence[int]) -> None:
        """Have the stored arrays of these rows in memory."""


class ZarrFiles:
    """Engines that read the cache itself."""

    @staticmethod
    def prepare(cache: Path, copy: Path) -> None:
        """Need nothing."""
        copy.mkdir()


class Ours(ZarrFiles):
    """`Cache.fill`, as the loader calls it."""

    def __init__(self, cache: Path, copy: Path) -> None:
        self.cache = open_cache(cache)
        self.out: dict[str, Any] = {}

    def read(self, rows: Sequence[int]) -> None:
        """Fill the same memory again."""
        self.out = self.out or self.cache.buffers(len(rows))
        out = {name: array[: len(rows)] for name, array in self.out.items()}
        self.cache.fill(TRAIN, [DOMAIN] * len(rows), rows, out)


class Bare(ZarrFiles):
    """`pread` from files that are open, at offsets that are known, and the decompressor."""

    def __init__(self, cache: Path, copy: Path) -> None:
        from ddk_cache.format.zarr_shard import index_of

        opened = open_cache(cache)
        self.spec, self.places = opened.spec, {}
        for number in range(opened.shard_count(DOMAIN, TRAIN)):
            key = ShardKey(DOMAIN, TRAIN, number)
            for name in self.spec.arrays:
                path = cache / object_name(self.spec, key, name)
                index = index_of(path.read_bytes(), str(path), self.spec.chunks_per_shard)
                handle = os.open(path, os.O_RDONLY)
                lengths = [length - 4 for length in index.lengths]
                self.places[number, name] = (handle, index.offsets, lengths)
        self.out = opened.buffers(self.spec.chunk_rows)

    def read(self, rows: Sequence[int]) -> None:
        """Read and decompress the chunk of each row into the same memory."""
        from numcodecs import blosc

        for row in rows:
            shard, place = divmod(row // self.spec.chunk_rows, self.spec.chunks_per_shard)
            for name, out in self.out.items():
                handle, offsets, lengths = self.places[shard, name]
                blosc.decompress(os.pread(handle, lengths[place], offsets[place]), out)


class Memmap:
    """np.memmap of the raw arrays: no compression, no checksums."""

    @staticmethod
    def prepare(cache: Path, copy: Path) -> None:
        """Write the raw arrays."""
        copy.mkdir()
        opened = open_cache(cache)
        files = {name: (copy / name).open("wb") for name in opened.spec.arrays}
        for stored in blocks(opened):
            for name, array in stored.items():
                array.tofile(files[name])
        for file in files.values():
            file.close()

    def __init__(self, cache: Path, copy: Path) -> None:
        self.arrays = {
            name: np.memmap(copy / name, layout.dtype, "r").reshape(-1, *layout.inner)
            for name, layout in open_cache(cache).spec.arrays.items()
        }

    def read(self, rows: Sequence[int]) -> None:
        """Copy rows."""
        for array in self.arrays.values():
            array[rows]


class ZarrPython(ZarrFiles):
    """zarr-python, one selection of rows for each array."""

    def __init__(self, cache: Path, copy: Path) -> None:
        import zarr

        group = zarr.open_group(cache / "domains" / DOMAIN / TRAIN, mode="r")
        self.arrays: list[Any] = [group[name] for name in open_cache(cache).spec.arrays]

    def read(self, rows: Sequence[int]) -> None:
        """Select rows."""
        for array in self.arrays:
            array.oindex[list(rows)]


class TensorStore(ZarrFiles):
    """tensorstore, all arrays at once."""

    def __init__(self, cache: Path, copy: Path) -> None:
        import tensorstore

        folder = cache / "domains" / DOMAIN / TRAIN
        self.arrays = [
            tensorstore.open(
                {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / name}/"}}
            ).result()
            for name in open_cache(cache).spec.arrays
        ]

    def read(self, rows: Sequence[int]) -> None:
        """Select rows of all arrays, then wait."""
        for future in [array[list(rows)].read() for array in self.arrays]:
            future.result()


class Mosaic:
    """mosaicml-streaming: one sample per row, shards compressed with zstd and then unpacked."""

    @staticmethod
    def prepare(cache: Path, copy: Path) -> None:
        """Write MDS shards."""
        from streaming import MDSWriter

        opened = open_cache(cache)
        columns = dict.fromkeys(opened.spec.arrays, "bytes")
        row = sum(array.nbytes for array in opened.buffers(1).values())
        settings: dict[str, Any] = {"compression": "zstd:5", "hashes": ["xxh3_128"]}
        with MDSWriter(
            out=str(copy), columns=columns, size_limit=ROWS_PER_SHARD * row + 2**16, **settings
        ) as writer:
            for stored in blocks(opened):
                for number in range(len(stored["tokens"])):
                    writer.write({name: array[number].tobytes() for name, array in stored.items()})

    def __init__(self, cache: Path, copy: Path) -> None:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        self.layouts = open_cache(cache).spec.arrays
        self.rows = StreamingDataset(local=str(copy), shuffle=False, batch_size=1, keep_zip=True)

    def read(self, rows: Sequence[int]) -> None:
        """Take samples by number."""
        for row in rows:
            sample = self.rows[int(row)]
            for name, layout in self.layouts.items():
                np.frombuffer(sample[name], layout.dtype)


class MosaicFirst(Mosaic):
    """The same in its first epoch, or when a bound on the disk made it drop what it unpacked."""

    def __init__(self, cache: Path, copy: Path) -> None:
        for path in copy.glob("*.mds"):
            path.unlink()
        super().__init__(cache, copy)


class LitData:
    """litdata: one sample per row, each compressed with zstd."""

    @staticmethod
    def prepare(cache: Path, copy: Path) -> None:
        """Write litdata chunks."""
        from litdata.streaming.writer import BinaryWriter

        copy.mkdir()
        settings: dict[str, Any] = {"compression": "zstd", "compression_level": "sample"}
        writer = BinaryWriter(str(copy), chunk_size=ROWS_PER_SHARD, **settings)
        number = 0
        for stored in blocks(open_cache(cache)):
            for place in range(len(stored["tokens"])):
                writer[number] = {n: array[place].tobytes() for n, array in stored.items()}
                number += 1
        writer.done()
        writer.merge()

    def __init__(self, cache: Path, copy: Path) -> None:
        from litdata import StreamingDataset

        self.layouts = open_cache(cache).spec.arrays
        self.rows = StreamingDataset(str(copy), shuffle=False)

    def read(self, rows: Sequence[int]) -> None:
        """Take samples by number."""
        for row in rows:
            sample = self.rows[int(row)]
            for name, layout in self.layouts.items():
                np.frombuffer(sample[name], layout.dtype)


def blocks(cache: Cache) -> Any:
    """Yield the stored rows of a cache, a shard at a time."""
    rows, size = cache.plan(DOMAIN).rows(TRAIN), cache.spec.shard_rows
    for first in range(0, rows, size):
        yield cache.read_stored(DOMAIN, TRAIN, range(first, min(first + size, rows)))


def drop_pages(folder: Path) -> None:
    """Drop the pages of all files below a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def remember(folder: Path) -> None:
    """Have all files below a folder in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def clear(copy: Path) -> None:
    """Remove the copy of an engine."""
    shutil.rmtree(copy, ignore_errors=True)


ENGINES: dict[str, type[Engine]] = {
    "ddk": Ours,
    "bare limit": Bare,
    "np.memmap, raw": Memmap,
    "zarr-python": ZarrPython,
    "tensorstore": TensorStore,
    "mosaicml-streaming": MosaicFirst,
    "mosaicml-streaming, unpacked": Mosaic,
    "litdata": LitData,
}

FIRST_EPOCH = {"mosaicml-streaming"}
"""Engines that are opened anew for each pass: what they did once would not be seen otherwise."""
