"""What a run, a checkpoint and a student were made from, and that it is still the same.

A cache is known by the fingerprint of its spec and by where its rows lie; it may grow, and a run
keeps to the rows that it began with. The same few facts are written into the run's config, into
every checkpoint and beside the finished student.
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


def provenance(cache: Cache, student: Any) -> dict[str, Any]:
    """Return what a run met: the cache's identity and the student's size."""
    return {
        "cache_fingerprint": cache.spec.fingerprint,
        "known_rows": {
            name: {split: cache.extents(name, split) for split in SPLITS} for name in cache.domains
        },
        "teacher": cache.manifest.root.provenance.get("teacher", ""),
        "targets": str(cache.spec.targets),
        "seq_len": cache.spec.seq_len,
        "student_class": type(student).__name__,
        "student_parameters": sum(p.numel() for p in student.parameters()),
    }


def known_rows(cache: Cache, known: dict[str, Any]) -> dict[str, dict[str, list[Extent]]]:
    """Return the rows that a run keeps to, by domain and split, after checking that they are there.

    A cache may have grown since the run began. Its old rows are where they were.

    Raises:
        MismatchError: the cache does not have the rows that the run knew.
    """
    rows = {
        name: {split: [Extent(*extent) for extent in runs] for split, runs in splits.items()}
        for name, splits in known.items()
    }
    for name, splits in rows.items():
        for split, runs in splits.items():
            if name not in cache.domains or cache.extents(name, split)[: len(runs)] != runs:
                raise MismatchError(
                    f"{cache.where} does not have the rows of {name}/{split} that this run began "
                    "with. Give the cache that it began with, or another run directory."
                )
    if rows.keys() != set(cache.domains) or any(
        len(cache.extents(name, split)) > len(runs)
        for name, splits in rows.items()
        for split, runs in splits.items()
    ):
        log.info(
            f"{cache.where} has grown; this run keeps to the rows that it began with (--new-rows)"
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
            "content": {name: cache.plan(name).content for name in cache.domains},
        },
        "student": student,
    }


def check_identity(checkpoint: Path, cache: Cache) -> None:
    """Raise MismatchError where a checkpoint was trained from another cache."""
    was = json.loads((checkpoint / IDENTITY).read_text())["cache"]["fingerprint"]
    if was != cache.spec.fingerprint:
        raise MismatchError(
            f"the checkpoint {checkpoint} was trained from the cache {was}, and {cache.where} is "
            f"{cache.spec.fingerprint}. Give the cache that it began with."
        )
