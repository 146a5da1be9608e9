"""A checked copy of the tokenizer of a cache.

Only the files that the root names are copied, each checked by its hash, so that nothing else which
lies in a cache can reach a student. The price is a temporary directory also for a local cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

from ddk_cache.errors import CorruptCacheError
from ddk_cache.format.layout import tokenizer_name
from ddk_cache.hashing import digest
from ddk_cache.storage.base import Storage


def copy_tokenizer(storage: Storage, files: Mapping[str, tuple[int, str]], owner: object) -> Path:
    """Return a private directory with the files, name → size and hash; it goes with its owner.

    Raises:
        CorruptCacheError: a file is missing or has changed.
    """
    folder = Path(tempfile.mkdtemp(prefix="ddk-"))
    weakref.finalize(owner, _remove, folder, os.getpid())
    for file, (_, hashed) in files.items():
        data = storage.get(tokenizer_name(file))
        if data is None or digest(data) != hashed:
            where = storage.uri(tokenizer_name(file))
            raise CorruptCacheError(f"{where} is missing or damaged.")
        (folder / file).write_bytes(data)
    return folder


def _remove(folder: Path, process: int) -> None:
    """Remove the directory, in the process that made it and not in one forked from it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
