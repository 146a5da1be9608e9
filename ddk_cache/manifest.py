"""The two JSON documents of a cache: the manifest in the root's attributes, and commit records.

The manifest says what the cache is and which rows it will hold; a record says that one shard of
them is there. Both carry a seal, the hash of their own content, so that a changed digit is an
error and not a number. They are kept apart because a manifest changes when the plan does, and a
record never does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddk_cache import files
from ddk_cache.schema import (
    FORMAT_VERSION,
    SPLITS,
    CacheSpec,
    CorruptCacheError,
    DomainPlan,
    FormatVersionError,
    InputError,
    NotACacheError,
    ShardKey,
    canonical,
    check_name,
    digest,
    shards,
)

ROOT = "zarr.json"
COMMITS = "commits"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Manifest:
    """What a cache is: its spec, the sources of its domains, and the rows planned for each."""

    spec: CacheSpec
    batch_rows: int
    """Rows that the teacher scores in one call."""
    sources: Mapping[str, Mapping[str, Any]]
    """Every domain that the cache shall have, and where its documents come from."""
    plans: Mapping[str, DomainPlan]
    """The domains whose rows are fixed."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Names and versions, for people; nothing depends on them."""

    def shards(self) -> list[ShardKey]:
        """Return every planned shard, in the order of building."""
        return [
            ShardKey(domain, split, index)
            for domain, plan in self.plans.items()
            for split in SPLITS
            for index in range(len(shards(plan, split, self.spec.shard_rows)))
        ]

    def write(self, root: Path) -> None:
        """Replace the root's attributes."""
        body = {
            "format_version": FORMAT_VERSION,
            "spec": self.spec.to_json(),
            "fingerprint": self.spec.fingerprint,
            "batch_rows": self.batch_rows,
            "sources": {name: dict(source) for name, source in self.sources.items()},
            "plans": {
                name: {
                    "documents": plan.documents,
                    "tokens": plan.tokens,
                    "content": plan.content,
                    "extents": {split: list(rows) for split, rows in plan.extents.items()},
                }
                for name, plan in self.plans.items()
            },
            "provenance": dict(self.provenance),
        }
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"ddk": sealed(body)}}
        files.replace(root / ROOT, json.dumps(group, indent=1).encode())

    @classmethod
    def read(cls, root: Path) -> Manifest:
        """Read the root of a cache.

        Raises:
            NotACacheError: there is none at `root`.
            FormatVersionError: it is of another format version.
            CorruptCacheError: it is not what was written.
        """
        try:
            group = json.loads((root / ROOT).read_bytes())
            body = group["attributes"]["ddk"]
        except (OSError, ValueError, KeyError, TypeError):
            raise NotACacheError(
                f"{root} is not a cache: it has no {ROOT} with the attributes that "
                "'ddk-cache build' writes."
            ) from None
        version = body.get("format_version") if isinstance(body, dict) else None
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                f"{root} has format version {version}; this ddk reads version {FORMAT_VERSION}. "
                "Use the ddk that built it, or build it again."
            )
        check_seal(body, str(root / ROOT))
        try:
            return cls(
                spec=CacheSpec.from_json(body["spec"]),
                batch_rows=int(body["batch_rows"]),
                sources=body["sources"],
                plans={
                    check_name(name): DomainPlan(
                        documents=int(plan["documents"]),
                        tokens=int(plan["tokens"]),
                        content=str(plan["content"]),
                        extents={
                            split: tuple(map(int, plan["extents"][split])) for split in SPLITS
                        },
                    )
                    for name, plan in body["plans"].items()
                },
                provenance=body["provenance"],
            )
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptCacheError(f"{root / ROOT} is damaged: {error!r}.") from error


@dataclass(frozen=True, kw_only=True)
class Record:
    """That one shard is there, whole: written last, and only then is the shard read."""

    key: ShardKey
    fingerprint: str
    """Of the spec that the shard was built under."""
    rows: int
    """Valid rows; the rest of the shard is padding."""
    positions: int
    """Positions where the loss counts."""
    teacher_loss: float
    """Sum over those positions of the teacher's −log p(true token), nats, before rounding."""
    objects: Mapping[str, tuple[int, str]]
    """Path below the root → size in bytes and hash."""

    def write(self, root: Path) -> None:
        """Write the record; from here on the shard is committed."""
        body = {
            "format_version": FORMAT_VERSION,
            "shard": list(self.key),
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            "positions": self.positions,
            "teacher_loss": self.teacher_loss,
            "objects": {path: list(entry) for path, entry in self.objects.items()},
        }
        path = record_path(root, self.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, json.dumps(sealed(body), indent=1).encode())

    @classmethod
    def read(cls, root: Path, key: ShardKey) -> Record:
        """Read the record of a shard. Raises CorruptCacheError where it is damaged."""
        path = record_path(root, key)
        try:
            body = json.loads(path.read_bytes())
            check_seal(body, str(path))
            record = cls(
                key=ShardKey(*body["shard"]),
                fingerprint=body["fingerprint"],
                rows=int(body["rows"]),
                positions=int(body["positions"]),
                teacher_loss=float(body["teacher_loss"]),
                objects={name: (int(n), str(h)) for name, (n, h) in body["objects"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCacheError(f"the commit record {path} is damaged: {error!r}.") from error
        if record.key != key:
            raise CorruptCacheError(f"{path} is the record of another shard, {record.key}.")
        return record


def record_path(root: Path, key: ShardKey) -> Path:
    """Return where the record of a shard lies."""
    return root / COMMITS / key.domain / key.split / f"{key.number}.json"


def object_path(root: Path, spec: CacheSpec, key: ShardKey, name: str) -> Path:
    """Return the file of one shard of one array: Zarr's key of its first row."""
    zeros = ["0"] * len(spec.arrays[name].inner)
    return root.joinpath("domains", key.domain, key.split, name, "c", str(key.number), *zeros)


def committed(root: Path, domain: str, split: str) -> set[int]:
    """Return the indices of the committed shards of a split, by their records' names."""
    folder = root / COMMITS / domain / split
    if not folder.is_dir():
        return set()
    return {int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal()}


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document with its seal."""
    return {**body, "seal": digest(canonical(body))}


def check_seal(body: object, where: str) -> None:
    """Raise CorruptCacheError unless the document is what was sealed."""
    if isinstance(body, dict):
        rest = {name: value for name, value in body.items() if name != "seal"}
        if body.get("seal") == digest(canonical(rest)):
            return
    raise CorruptCacheError(f"{where} is damaged: its content does not match its seal.")
