"""The JSON documents of a cache: the root, the plan of each domain, the record of each shard.

Each changes at another time and is its own file: the root says what the cache is and is written
once; a plan fixes the rows of a domain; a record says that one shard is there, whole. So any
number of processes can work on one cache without ever writing the same document. All carry a
seal, the hash of their own content, and are read only if they are byte for byte what writing
them again would give: a changed digit is an error, not a number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ddk_cache import files, process
from ddk_cache.audit import sound
from ddk_cache.schema import (
    READABLE_VERSIONS,
    SPLITS,
    CacheError,
    CacheSpec,
    CorruptCacheError,
    DDKError,
    DomainPlan,
    FormatVersionError,
    NotACacheError,
    Portion,
    ShardKey,
    canonical,
    check_name,
    digest,
    shards,
)

ROOT = "zarr.json"
PLANS = "plans"
COMMITS = "commits"
TOKENIZER = "tokenizer"

T = TypeVar("T")


# --- documents ------------------------------------------------------------------------------------


def dump(body: Mapping[str, Any], version: int) -> bytes:
    """Return the bytes of a sealed document."""
    sealed = {"format_version": version, **body}
    sealed["seal"] = digest(canonical(sealed))
    return json.dumps(sealed, indent=1, allow_nan=False).encode()


def parse(data: bytes, where: str, versions: Sequence[int]) -> tuple[dict[str, Any], int]:
    """Return the body of a sealed document and its format version.

    Raises:
        FormatVersionError: it is of none of these versions.
        CorruptCacheError: it is not what was written.
    """
    try:
        body = json.loads(data)
        version = body.pop("format_version")
        body.pop("seal", None)
        if type(version) is int and version in versions and dump(body, version) == data:
            return dict(body), version
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCacheError(f"{where} is damaged: {error!r}.") from error
    if version not in versions:
        known = " and ".join(map(str, versions))
        raise FormatVersionError(
            f"{where} has format version {version}; version {known} is read here. Use the ddk "
            "that built it, or build it again."
        )
    raise CorruptCacheError(f"{where} is damaged: its content does not match its seal.")


def read(path: Path) -> bytes:
    """Return the bytes of a document; a missing one is a CorruptCacheError, for it was named."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptCacheError(f"{path} cannot be read: {error.strerror}.") from error


def typed(value: Any, kind: type[T], least: float = 0, most: float = 2**62) -> T:
    """Return a value that is exactly of a type and, a number, in its bounds; ValueError else."""
    number = kind in (int, float)
    if type(value) is not kind or (number and not least <= value <= most):  # type: ignore[operator]
        raise ValueError(f"{value!r} where a {kind.__name__} belongs")
    return value


def file_name(name: Any) -> str:
    """Return the name of a file in a folder, if it is one and leads nowhere else."""
    if Path(typed(name, str)).name != name or name.startswith("."):
        raise ValueError(f"{name!r} is no name of a file")
    return str(name)


# --- the root and the plans -----------------------------------------------------------------------


@dataclass(frozen=True)
class Root:
    """What a cache is."""

    spec: CacheSpec
    batch_rows: int
    """Rows that the teacher scores in one call: they too decide the last bits of its word."""
    sources: Mapping[str, Mapping[str, Any]]
    """Every domain that the cache shall have, and where its documents come from."""
    tokenizer_files: Mapping[str, tuple[int, str]]
    """Name → size and hash."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Names and versions, for people; nothing depends on them."""

    def dump(self) -> bytes:
        """Return the root's group document."""
        body = {
            "spec": self.spec.to_json(),
            "fingerprint": self.spec.fingerprint,
            "batch_rows": self.batch_rows,
            "sources": {name: dict(source) for name, source in self.sources.items()},
            "tokenizer_files": {name: list(entry) for name, entry in self.tokenizer_files.items()},
            "provenance": dict(self.provenance),
        }
        attributes = {"ddk": json.loads(dump(body, self.spec.format_version))}
        group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        return json.dumps(group, indent=1).encode()

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Root:
        """Read what `dump` wrote; see `Manifest.read` for the errors."""
        try:
            inner = json.loads(data)["attributes"]["ddk"]
            inner = {"format_version": inner["format_version"], **inner}
            document = json.dumps(inner, indent=1, allow_nan=False).encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            raise NotACacheError(
                f"{path.parent} is not a cache: it has no {ROOT} with the attributes that "
                "'ddk-cache build' writes."
            ) from None
        body, version = parse(document, str(path), READABLE_VERSIONS)
        root: Root = understand(path, lambda: cls._of(body, version))
        if root.dump() != data:
            raise CorruptCacheError(f"{path} is damaged: it is not what was written.")
        return root

    @classmethod
    def _of(cls, body: Mapping[str, Any], version: int) -> Root:
        return cls(
            spec=CacheSpec.from_json(body["spec"], version),
            batch_rows=typed(body["batch_rows"], int, 1),
            sources={check_name(name): typed(s, dict) for name, s in body["sources"].items()},
            tokenizer_files={
                file_name(name): (typed(size, int, 0), typed(hashed, str))
                for name, (size, hashed) in body["tokenizer_files"].items()
            },
            provenance={name: typed(v, str) for name, v in body["provenance"].items()},
        )


def understand(path: Path, build: Any) -> Any:
    """Return `build()`; what it cannot make sense of is a CorruptCacheError of that file."""
    try:
        return build()
    except CacheError:
        raise
    except (DDKError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptCacheError(f"{path} is damaged: {error!r}.") from error


@dataclass(frozen=True)
class Manifest:
    """A cache's root, and the plans that are fixed so far."""

    root: Root
    plans: Mapping[str, DomainPlan]

    @property
    def spec(self) -> CacheSpec:
        """Return what the cache is."""
        return self.root.spec

    def shards(self) -> list[ShardKey]:
        """Return every planned shard, in the order of building."""
        return [
            ShardKey(domain, split, number)
            for domain, plan in self.plans.items()
            for split in SPLITS
            for number in range(len(shards(plan, split, self.spec.shard_rows)))
        ]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read the documents of the cache at `path`.

        Raises:
            NotACacheError: there is none.
            FormatVersionError: it is of another format version.
            CorruptCacheError: a document is not what was written.
        """
        try:
            data = (path / ROOT).read_bytes()
        except OSError:
            data = b""
        root = Root.parse(data, path / ROOT)
        planned = [name for name in sorted(root.sources) if plan_path(path, name).exists()]
        return cls(root, {name: read_plan(path, root.spec, name) for name in planned})


def create_root(path: Path, root: Root) -> bool:
    """Write the root of a new cache; False where another process was first."""
    partial = path / f"{ROOT}~{process.owner()}{files.PARTIAL}"
    files.replace(partial, root.dump())
    try:
        os.link(partial, path / ROOT)
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    files.sync(path)
    return True


def plan_path(root: Path, domain: str) -> Path:
    """Return where the plan of a domain lies."""
    return root / PLANS / f"{domain}.json"


def write_plan(root: Path, spec: CacheSpec, domain: str, plan: DomainPlan) -> None:
    """Fix the rows of a domain."""
    portions = [
        {
            "documents": portion.documents,
            "tokens": portion.tokens,
            "content": portion.content,
            "rows": {split: portion.rows[split] for split in SPLITS},
        }
        for portion in plan.portions
    ]
    body = {
        "domain": domain,
        "fingerprint": spec.fingerprint,
        "portions": portions,
        "frequent_ids": list(plan.frequent_ids),
        "metadata": dict(plan.metadata),
    }
    plan_path(root, domain).parent.mkdir(exist_ok=True)
    files.replace(plan_path(root, domain), dump(body, spec.format_version))


def read_plan(root: Path, spec: CacheSpec, domain: str) -> DomainPlan:
    """Read the plan of a domain. Raises CorruptCacheError where it is damaged or another's."""
    path = plan_path(root, domain)
    try:
        body, _ = parse(read(path), str(path), [spec.format_version])
    except CorruptCacheError as error:
        again = "If it is removed, 'ddk-cache build' makes the whole domain again."
        raise CorruptCacheError(f"{error} {again}") from error
    if (body.get("domain"), body.get("fingerprint")) != (domain, spec.fingerprint):
        raise CorruptCacheError(f"{path} belongs to another domain or cache.")

    def build() -> DomainPlan:
        portions = tuple(
            Portion(
                documents=typed(portion["documents"], int, 1),
                tokens=typed(portion["tokens"], int, 1),
                content=typed(portion["content"], str),
                rows={split: typed(portion["rows"][split], int, 0) for split in SPLITS},
            )
            for portion in body["portions"]
        )
        if not portions:
            raise ValueError("a plan without a portion")
        metadata = {typed(name, str): typed(text, str) for name, text in body["metadata"].items()}
        for name, text in metadata.items():
            text.encode()
            if ".." in name or not (name.startswith("domains/") and name.endswith("/zarr.json")):
                raise ValueError(f"{name!r} is no Zarr document of a domain")
        known = body.get("frequent_ids", ())
        frequent = tuple(typed(number, int, 0, spec.vocab_size - 1) for number in known)
        if len(set(frequent)) != len(frequent):
            raise ValueError("frequent ids that stand there twice")
        return DomainPlan(portions, metadata, frequent)

    plan: DomainPlan = understand(path, build)
    for split in SPLITS:
        check_shown(root, spec, domain, split, plan)
    return plan


def check_shown(root: Path, spec: CacheSpec, domain: str, split: str, plan: DomainPlan) -> None:
    """Believe a plan only as far as there are files to show for it.

    Token rows are written before their plan. Some may have been lost since; most cannot, and a
    number of rows that nothing bears out must not decide how long a list becomes.

    Raises:
        CorruptCacheError: it names many more shards than there are.
    """
    planned = sum(-(-portion.rows[split] // spec.shard_rows) for portion in plan.portions)
    folder = root / "domains" / domain / split / "tokens" / "c"
    there = sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
    if planned > 4 * there + 1024:
        raise CorruptCacheError(
            f"{plan_path(root, domain)} plans {planned:,} shards of {split} rows, and {there:,} "
            "are there. If it is removed, 'ddk-cache build' makes the whole domain again."
        )


# --- records --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Object:
    """One committed file: a shard of one array."""

    bytes: int
    hash: str
    """xxh3-128 of the file."""
    chunks: str
    """The crc32c of each chunk, eight hex digits each: a chunk is read only if it has it, so that
    a good shard in the wrong place is noticed without reading it as a whole."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """That one shard is there, whole: written last, and only then is the shard read."""

    key: ShardKey
    fingerprint: str
    """Of the spec that the shard was built under."""
    content: str
    """Of the portion that its rows come from."""
    rows: int
    """Valid rows; the rest of the shard is padding."""
    positions: int
    """Positions where the loss counts."""
    teacher_loss: float
    """Sum over those positions of the teacher's −log p(true token), nats, before rounding."""
    batch_rows: int
    """Rows that the teacher scored in one call."""
    audit: Mapping[str, Any]
    """What was seen while it was written; see `ddk_cache.audit`."""
    objects: Mapping[str, Object]
    """By array."""

    def write(self, root: Path, version: int) -> None:
        """Write the record; from here on the shard is committed."""
        body = {
            "shard": list(self.key),
            "fingerprint": self.fingerprint,
            "content": self.content,
            "rows": self.rows,
            "positions": self.positions,
            "teacher_loss": self.teacher_loss,
            "batch_rows": self.batch_rows,
            "audit": dict(self.audit),
            "objects": {name: vars(entry) for name, entry in self.objects.items()},
        }
        path = record_path(root, self.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, dump(body, version))


def read_record(root: Path, manifest: Manifest, key: ShardKey) -> Record:
    """Read the record of a planned shard.

    Raises:
        CorruptCacheError: it is damaged, or of another shard, plan or cache.
    """
    path, spec = record_path(root, key), manifest.spec
    body, _ = parse(read(path), str(path), [spec.format_version])

    def build() -> Record:
        return Record(
            key=ShardKey(*body["shard"]),
            fingerprint=typed(body["fingerprint"], str),
            content=typed(body["content"], str),
            rows=typed(body["rows"], int, 1),
            positions=typed(body["positions"], int, 0, planned.rows * spec.seq_len),
            teacher_loss=typed(body["teacher_loss"], float, -1, 1e6 * body["positions"]),
            batch_rows=typed(body["batch_rows"], int, 1),
            audit=sound(body["audit"], planned.rows * spec.seq_len),
            objects={
                name: Object(
                    bytes=typed(body["objects"][name]["bytes"], int, 0),
                    hash=typed(body["objects"][name]["hash"], str),
                    chunks=typed(body["objects"][name]["chunks"], str),
                )
                for name in spec.arrays
            },
        )

    planned = shards(manifest.plans[key.domain], key.split, spec.shard_rows)[key.number]
    record: Record = understand(path, build)
    if (record.key, record.fingerprint, record.rows, record.content) != (
        *(key, spec.fingerprint),
        *planned,
    ):
        raise CorruptCacheError(f"{path} is the record of another shard or cache ({record.key}).")
    if {len(entry.chunks) for entry in record.objects.values()} != {8 * spec.chunks_per_shard}:
        raise CorruptCacheError(f"{path} is damaged: checksums are missing.")
    return record


def record_path(root: Path, key: ShardKey) -> Path:
    """Return where the record of a shard lies."""
    return root / COMMITS / key.domain / key.split / f"{key.number}.json"


def object_path(root: Path, spec: CacheSpec, key: ShardKey, name: str) -> Path:
    """Return the file of one shard of one array: Zarr's key of its first row."""
    zeros = ["0"] * len(spec.arrays[name].inner)
    return root.joinpath("domains", key.domain, key.split, name, "c", str(key.number), *zeros)


def committed(root: Path, domain: str, split: str) -> set[int]:
    """Return the numbers of the committed shards of a split, by their records' names."""
    folder = root / COMMITS / domain / split
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return set()
    numbers = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    return {int(number) for number in numbers if number.isascii() and number.isdecimal()}
