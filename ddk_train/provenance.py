"""What a run, a checkpoint and a student were made from, and checks that it is still the same.

A cache is identified by the fingerprint of its spec and by the positions of its rows; it may grow,
and a run keeps the rows that it started with. A student is identified by a hash of its weights, or
of the config of a fresh one, so that paths may move. The same few facts are written into the config
of a run, into every checkpoint and into the finished student.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ddk_cache import SPLITS, Cache, Extent, MismatchError

log = logging.getLogger(__name__)

IDENTITY = "ddk.json"
"""The file of a checkpoint or student that says what it was made from."""


def provenance(cache: Cache, student: Any, student_hash: str) -> dict[str, Any]:
    """Return the identity of the cache of a run and of its student."""
    return {
        "cache_fingerprint": cache.spec.fingerprint,
        "known_rows": {
            name: {split: cache.extents(name, split) for split in SPLITS} for name in cache.domains
        },
        "teacher": teacher_names(cache),
        "targets": str(cache.spec.targets),
        "seq_len": cache.spec.seq_len,
        "student_hash": student_hash,
        "student_class": type(student).__name__,
        "student_parameters": sum(p.numel() for p in student.parameters()),
    }


def teacher_names(cache: Cache) -> str:
    """Return the name of the teacher of a cache, and those of single domains."""
    root = cache.manifest.root
    others = [f"{root.sources[n]['teacher_name']} ({n})" for n in cache.manifest.teachers]
    return ", ".join([root.provenance.get("teacher", ""), *others])


def known_rows(cache: Cache, known: dict[str, Any]) -> dict[str, dict[str, list[Extent]]]:
    """Return the rows that a run started with, by domain and split, after checking the cache.

    A cache may have grown since then; its old rows keep their positions.

    Raises:
        MismatchError: the cache lacks rows that the run started with.
    """
    rows = {
        name: {split: [Extent(*extent) for extent in runs] for split, runs in splits.items()}
        for name, splits in known.items()
    }
    for name, splits in rows.items():
        for split, runs in splits.items():
            if name not in cache.domains or cache.extents(name, split)[: len(runs)] != runs:
                raise MismatchError(
                    f"{cache.where} lacks rows of {name}/{split} that this run started with. Give "
                    "the cache that it started with, or another run directory."
                )
    if rows.keys() != set(cache.domains) or any(
        len(cache.extents(name, split)) > len(runs)
        for name, splits in rows.items()
        for split, runs in splits.items()
    ):
        log.info(
            f"{cache.where} has grown; this run keeps the rows that it started with "
            "(--new-rows takes the new ones too)"
        )
    return rows


def identity(cache: Cache, student: str) -> dict[str, Any]:
    """Return what a student or a checkpoint was made from."""
    spec = cache.spec
    return {
        "cache": {
            "fingerprint": spec.fingerprint,
            "targets": str(spec.targets),
            "teacher": dict(spec.teacher),
            "tokenizer": dict(spec.tokenizer),
            "domain_teachers": cache.manifest.teachers,
            "content": {name: cache.plan(name).content for name in cache.domains},
        },
        "student": student,
    }


def check_identity(checkpoint: Path, cache: Cache) -> None:
    """Check that a checkpoint was trained from this cache.

    Raises:
        MismatchError: it was trained from another one.
        OSError, ValueError, LookupError, TypeError: its identity is missing or damaged.
    """
    known = json.loads((checkpoint / IDENTITY).read_text())["cache"]
    was, teachers = known["fingerprint"], known.get("domain_teachers", {})
    if was != cache.spec.fingerprint:
        raise MismatchError(
            f"the checkpoint {checkpoint} was trained from the cache {was}, and {cache.where} is "
            f"{cache.spec.fingerprint}. Give the cache that it was trained from."
        )
    now = {name: cache.manifest.teachers.get(name) for name in teachers}
    if teachers != now:
        raise MismatchError(
            f"the checkpoint {checkpoint} was trained from a cache with the domain teachers "
            f"{teachers}, and {cache.where} has {now}. Give the cache that it was trained from."
        )
