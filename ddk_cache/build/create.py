"""A cache that is to be built: created, or found to be the one that was asked for.

Nothing is written before everything is compared, so a wrong call leaves a cache as it was.
Settings are pinned by work, not by an attempt: until a domain is planned, another call may change
them. Several processes may come at once; the first one's root is the root.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddk_cache.build.audit import audit
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.scoring import Scorer, rows_that_fit
from ddk_cache.build.teacher import Teacher
from ddk_cache.build.writer import ShardWriter
from ddk_cache.corpus.document import document_of
from ddk_cache.corpus.sources import Source, read_fields
from ddk_cache.errors import InputError, MismatchError
from ddk_cache.format.layout import PLANS, ROOT, TOKENIZER, plan_name, tokenizer_name
from ddk_cache.format.manifest import Root, create_root
from ddk_cache.format.place import check_place, not_ours, read_root
from ddk_cache.format.plan import ShardKey
from ddk_cache.format.spec import CacheSpec
from ddk_cache.hashing import digest
from ddk_cache.hf import identify_tokenizer
from ddk_cache.storage.base import Storage
from ddk_cache.storage.lease import Leases

log = logging.getLogger(__name__)

TRIAL = "trial"
"""The domain of a first batch, which is not of the cache."""

GROW = " --grow adds new domains, and documents at the end of old ones."


def make_spec(config: BuildConfig, teacher: Teacher, tokenizer: Any) -> CacheSpec:
    """Return the spec of a cache.

    Raises:
        InputError: the teacher cannot score such rows, or the tokenizer is not the teacher's.
    """
    if config.packing == "documents":
        teacher.require_isolation()
    width = 1 + max(tokenizer.get_vocab().values())
    if width > teacher.vocab_size:
        raise InputError(
            f"the tokenizer has {width:,} tokens and the teacher only {teacher.vocab_size:,} "
            "outputs: they do not belong together. Give the teacher's own tokenizer."
        )
    if teacher.positions is not None and config.seq_len > teacher.positions:
        raise InputError(
            f"seq_len: got {config.seq_len:,}, expected at most {teacher.positions:,}, the "
            f"positions that the teacher {teacher.name!r} was made for. Give a smaller --seq-len."
        )
    return config.spec(teacher.vocab_size, teacher.identity, identify_tokenizer(tokenizer))


def settled(
    config: BuildConfig, sources: Sequence[Source], storage: Storage | None = None
) -> BuildConfig:
    """Return the settings with the packing decided: that of a cache which has a plan, or by the
    first document of each domain.

    Raises:
        InputError: a setting does not go with the packing.
    """  # noqa: D205
    packing = config.packing
    if packing == "auto" and storage and storage.list_dir(PLANS):
        packing = read_root(storage).spec.packing
    elif packing == "auto":
        packing = "stream" if all(map(_holds_text, sources)) else "documents"
    if packing == "stream" and config.too_long != "split":
        raise InputError(
            f"too_long: got {config.too_long!r}, which is for documents that are kept apart. Give "
            "--packing documents too, or leave it out."
        )
    return dataclasses.replace(config, packing=packing)


def _holds_text(source: Source) -> bool:
    try:
        found = filter(None, map(document_of, read_fields(source)))
        return isinstance(next(found, ""), str)
    except InputError:  # of a source that cannot be read; planning will say so
        return True


def open_for_building(
    store: ShardWriter,
    leases: Leases,
    described: Mapping[str, Mapping[str, Any]],
    teacher: Teacher,
    tokenizer: Any,
    batch_rows: int | None,
    grow: bool,
    most: int | None = None,
) -> None:
    """Create the cache, or check that it is the one asked for; nothing is written before that.

    `described` are the sources, as the root keeps them; `most` is how many rows of one call fit the
    teachers of single domains.

    The new domains of a cache that grows are added later, when they are planned: `add_sources`.

    Raises:
        InputError: the place holds something else.
        MismatchError: the cache was begun with other settings; each is named.
        CacheError: the teacher fails on a first batch.
    """
    storage = store.storage
    check_place(storage)
    files = tokenizer_files(tokenizer)
    if not storage.exists(ROOT):
        root = new_root(store.spec, described, teacher, tokenizer, files, batch_rows, most)
        try:
            create_root(storage, root)
        except (FileExistsError, NotADirectoryError) as error:
            raise not_ours(storage) from error
    was = read_root(storage)
    planned = _planned(storage, was)
    settings = was.spec.to_json() | {"batch_rows": was.batch_rows}
    asked = store.spec.to_json() | {"batch_rows": batch_rows or was.batch_rows}
    if settings != asked and not planned and not leases.others():
        log.info("%s: nothing is planned yet; it takes the new settings", storage.uri())
        was = new_root(store.spec, described, teacher, tokenizer, files, batch_rows, most)
        storage.put(ROOT, was.dump())
        storage.delete_dir(TOKENIZER)
    else:
        compare(storage.uri(), settings, asked)
    if grow:
        again = planned.keys() & described.keys()
        olds, news = ({n: found[n].get("teacher") for n in again} for found in (planned, described))
        compare(storage.uri(), olds, news)
    else:
        _agree(store, was, described, planned, leases)
    for name, data in files.items():
        kept = tokenizer_name(name)
        if name in was.tokenizer_files and storage.get(kept) != data:
            storage.put(kept, data)


def _agree(
    store: ShardWriter,
    was: Root,
    described: Mapping[str, Any],
    planned: Mapping[str, Any],
    leases: Leases,
) -> None:
    """Compare the sources of a cache with those given, which replace those of unplanned domains."""
    where = store.storage.uri()
    if was.sources == described:
        return
    if len(planned) == len(was.sources) or leases.others():
        compare(where, was.sources, described, GROW)
    compare(where, planned, {name: described.get(name) for name in planned}, GROW)
    store.storage.put(ROOT, dataclasses.replace(was, sources=described).dump())
    for name in was.sources.keys() - described.keys():
        store.clear(name)


def add_sources(storage: Storage, described: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a cache the domains that it has grown by; only now does a reader see them.

    A domain that was never planned and is no longer among the sources is dropped.
    """
    was = read_root(storage)
    merged = {**_planned(storage, was), **described}
    if merged != was.sources:
        storage.put(ROOT, dataclasses.replace(was, sources=merged).dump())


def _planned(storage: Storage, root: Root) -> dict[str, Mapping[str, Any]]:
    """Return the sources of the domains that are planned."""
    return {name: root.sources[name] for name in root.sources if storage.exists(plan_name(name))}


def new_root(
    spec: CacheSpec,
    described: Mapping[str, Mapping[str, Any]],
    teacher: Teacher,
    tokenizer: Any,
    files: Mapping[str, bytes],
    batch_rows: int | None,
    most: int | None = None,
) -> Root:
    """Return the root of a new cache, once the teacher has scored a first batch.

    Raises:
        CacheError: the teacher fails on it, or gives something that is not a distribution.
    """
    rows = try_teacher(teacher, spec, batch_rows)
    return Root(
        spec=spec,
        batch_rows=min(rows, most or rows),
        sources=described,
        tokenizer_files={name: (len(data), digest(data)) for name, data in files.items()},
        provenance={
            "teacher": teacher.name,
            "tokenizer": str(tokenizer.name_or_path),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    )


def try_teacher(teacher: Teacher, spec: CacheSpec, batch_rows: int | None) -> int:
    """Score and audit a first batch; return the rows of one call, as asked or as they fit.

    A teacher that cannot be used is found before the corpus is read.
    """
    rows = 1 if batch_rows else rows_that_fit(teacher, spec)
    scorer = Scorer(teacher, spec, rows)
    tokens = np.zeros((rows, spec.seq_len + 1), np.int64)
    segments = np.ones_like(tokens) if spec.packing == "documents" else None
    key = ShardKey(TRIAL, "train", 0)
    scores = scorer.score(key, tokens, lambda _: None, segments).arrays
    labels = tokens[:, 1:]
    audit("a first batch", scores, scorer.codec.encode(scores, labels), labels, scorer.codec)
    return batch_rows or scorer.batch_rows


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
