"""A cache that is to be built: created, or found to be the one that was asked for.

Nothing is written before everything is compared, so that a wrong call leaves a cache as it was.
Several processes may come at once: the first one's root is the root.
"""

from __future__ import annotations

import dataclasses
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ddk_cache.atomic import PARTIAL
from ddk_cache.build.scoring import first_batch
from ddk_cache.build.teacher import Teacher
from ddk_cache.corpus.sources import Source
from ddk_cache.errors import InputError, MismatchError, NotACacheError
from ddk_cache.format.layout import ROOT, tokenizer_name
from ddk_cache.format.manifest import Manifest, Root, create_root
from ddk_cache.format.spec import CacheSpec
from ddk_cache.hashing import digest
from ddk_cache.storage.base import Storage


def open_for_building(
    storage: Storage,
    spec: CacheSpec,
    sources: Sequence[Source],
    teacher: Teacher,
    tokenizer: Any,
    batch_rows: int | None,
    grow: bool,
) -> None:
    """Create the cache, or check that it is the one asked for; nothing is written before that.

    Raises:
        InputError: the place holds something else.
        MismatchError: the cache was begun with other settings; each is named.
    """
    described = {source.name: source.describe() for source in sources}
    words = tokenizer_files(tokenizer)
    if not storage.exists(ROOT):
        _create(storage, spec, described, teacher, tokenizer, words, batch_rows)
    try:
        was = Manifest.read(storage).root
    except NotACacheError as error:
        raise _not_ours(storage) from error
    beside = {"batch_rows": was.batch_rows}
    asked = {"batch_rows": batch_rows or was.batch_rows}
    compare(storage.uri(), was.spec.to_json() | beside, spec.to_json() | asked)
    if not grow:
        hint = " --grow adds new domains, and documents at the end of old ones."
        compare(storage.uri(), dict(was.sources), described, hint)
    elif (merged := {**was.sources, **described}) != was.sources:
        storage.put(ROOT, dataclasses.replace(was, sources=merged).dump())
    for name, data in words.items():
        kept = tokenizer_name(name)
        if name in was.tokenizer_files and storage.get(kept) != data:
            storage.put(kept, data)


def _create(
    storage: Storage,
    spec: CacheSpec,
    described: Mapping[str, Mapping[str, Any]],
    teacher: Teacher,
    tokenizer: Any,
    words: Mapping[str, bytes],
    batch_rows: int | None,
) -> None:
    """Write the root of a new cache, unless another process is first."""
    there = storage.list_dir("")
    if ROOT not in there and not all(name.endswith(PARTIAL) for name in there):
        raise _not_ours(storage)
    root = Root(
        spec=spec,
        batch_rows=batch_rows or first_batch(teacher, spec),
        sources=described,
        tokenizer_files={name: (len(data), digest(data)) for name, data in words.items()},
        provenance={
            "teacher": teacher.name,
            "tokenizer": str(tokenizer.name_or_path),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    )
    try:
        create_root(storage, root)
    except (FileExistsError, NotADirectoryError) as error:
        raise _not_ours(storage) from error


def _not_ours(storage: Storage) -> InputError:
    return InputError(f"{storage.uri()} exists and is not a cache. Give another path.")


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the files of a tokenizer, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def compare(where: str, was: Mapping[str, Any], now: Mapping[str, Any], hint: str = "") -> None:
    """Raise MismatchError naming every setting in which a build differs from its cache."""
    differences = [
        f"  {name}: the cache has {was.get(name)}, this build asks for {now.get(name)}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]
    if differences:
        raise MismatchError(
            f"{where} was begun with other settings:\n"
            + "\n".join(differences)
            + f"\nUse another path, or the original values.{hint}"
        )
