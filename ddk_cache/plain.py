"""Chunks of an array that was stored with other codecs than ours: by zarr-python, and loudly.

The direct reader knows one chain: bytes, blosc with any of its compressors, crc32c. Whoever
stores an array with another inside the same shards still has a cache, only a slow one: the
checksums are those of the record all the same, and zarr-python does the rest.
"""

from __future__ import annotations

import json
from typing import Any

from ddk_cache.console import say
from ddk_cache.errors import CorruptCacheError
from ddk_cache.objects import Folder, Objects
from ddk_cache.schema import Array

DIRECT = ["bytes", "blosc", "crc32c"]
"""Codecs inside a shard that the direct reader undoes."""


def codecs(document: str) -> list[str]:
    """Return the names of the codecs inside the shards that a Zarr document describes."""
    try:
        (sharding,) = json.loads(document)["codecs"]
        return [str(codec["name"]) for codec in sharding["configuration"]["codecs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCacheError(f"a Zarr document describes no shards: {error!r}.") from error


def plain(objects: Objects, name: str, document: str | None) -> Plain | None:
    """Return the way to read an array that the direct reader cannot; None where it can.

    `document` is the array's Zarr document as its plan keeps it.
    """
    found = codecs(document) if document else DIRECT
    if found == DIRECT:
        return None
    where = objects.where(name)
    if not isinstance(objects, Folder):
        raise CorruptCacheError(
            f"{where} was stored with the codecs {', '.join(found)}, which are read from a "
            "directory only. Copy the cache to one."
        )
    say(
        f"{where} was stored with the codecs {', '.join(found)} instead of {', '.join(DIRECT)}: "
        "it is read by zarr-python, several times slower."
    )
    return Plain(where)


class Plain:
    """An array as zarr-python sees it."""

    def __init__(self, where: str) -> None:
        import zarr

        self.where = where
        self.array: Any = zarr.open_array(where, mode="r")

    def read(self, number: int, out: Array) -> None:
        """Read a chunk, (chunk_rows, …). CorruptCacheError: zarr-python cannot."""
        first = number * len(out)
        try:
            out[:] = self.array[first : first + len(out)]
        except (ValueError, RuntimeError, OSError) as error:
            raise CorruptCacheError(f"{self.where} is damaged: {error}.") from error
