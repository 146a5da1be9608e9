"""The root and the plans of a cache.

Each document changes at another time and is its own file: the root says what the cache is and is
written once; a plan fixes the rows of a domain; a record (`ddk_cache.format.commit`) says that one
shard is complete. So any number of processes can work on one cache without writing the same
document. All are sealed, and are read only if writing them again would give the same bytes: a
changed digit is an error, not a number.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ddk_cache.errors import CorruptCacheError, NotACacheError
from ddk_cache.format.documents import dump, file_name, parse, read, typed, understand
from ddk_cache.format.layout import ROOT, is_document, object_name, plan_name
from ddk_cache.format.plan import DomainPlan, Portion, ShardKey, shard_count
from ddk_cache.format.spec import CacheSpec, check_name
from ddk_cache.storage.base import Storage
from ddk_cache.types import SPLITS

MODEL_FILES = re.compile(
    r"(config|generation_config|adapter_config|ddk)\.json|.*\.(safetensors|bin|pt|pth|index\.json)"
)
"""Files of a model, which no tokenizer has: copied next to a student they would replace its own."""

MOST_UNLISTED = 2**20
"""Planned shards of a split on a server that lists nothing, at most: each is asked for."""

LOOKED_FOR = 16
"""Shards that are looked for before the number in a plan is believed."""


@dataclass(frozen=True)
class Root:
    """What a cache is."""

    spec: CacheSpec
    batch_rows: int
    """Rows that the teacher scores in one call: they decide the last bits of its outputs too."""
    sources: Mapping[str, Mapping[str, Any]]
    """Every domain that the cache is to have, and where its documents come from."""
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
        attributes = {"ddk": json.loads(dump(body))}
        group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        return json.dumps(group, indent=1).encode()

    @classmethod
    def parse(cls, data: bytes, storage: Storage) -> Root:
        """Read what `dump` wrote; see `Manifest.read` for the errors."""
        try:
            inner = json.loads(data)["attributes"]["ddk"]
            inner = {"format_version": inner["format_version"], **inner}
            document = json.dumps(inner, indent=1, allow_nan=False).encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            raise NotACacheError(
                f"{storage.uri()} is not a cache: it has no {ROOT} with the attributes that "
                "'ddk-cache build' writes."
            ) from None
        where = storage.uri(ROOT)
        body = parse(document, where)
        root: Root = understand(where, lambda: cls._of(body))
        if root.dump() != data:
            raise CorruptCacheError(f"{where} is damaged: it is not what was written.")
        return root

    @classmethod
    def _of(cls, body: Mapping[str, Any]) -> Root:
        if not body["sources"]:
            raise ValueError("it names no domain")
        return cls(
            spec=CacheSpec.from_json(body["spec"]),
            batch_rows=typed(body["batch_rows"], int, 1),
            sources={check_name(name): _source(s) for name, s in body["sources"].items()},
            tokenizer_files={
                tokenizer_file(name): (typed(size, int, 0), typed(hashed, str))
                for name, (size, hashed) in body["tokenizer_files"].items()
            },
            provenance={name: typed(v, str) for name, v in body["provenance"].items()},
        )


@dataclass(frozen=True)
class Manifest:
    """A cache's root, and the plans that are fixed so far."""

    root: Root
    plans: Mapping[str, DomainPlan]

    @property
    def spec(self) -> CacheSpec:
        """Return what the cache is."""
        return self.root.spec

    @property
    def teachers(self) -> dict[str, dict[str, str]]:
        """Return the identity of the teacher of each domain that has one of its own."""
        sources = self.root.sources.items()
        return {name: dict(source["teacher"]) for name, source in sources if "teacher" in source}

    def spec_of(self, domain: str) -> CacheSpec:
        """Return the spec with the teacher of a domain, which decides the domain's bytes.

        They are those of the same domain in a cache of that teacher alone.
        """
        teacher = self.root.sources[domain].get("teacher")
        return dataclasses.replace(self.spec, teacher=teacher) if teacher else self.spec

    def shards(self, domains: Collection[str] | None = None) -> list[ShardKey]:
        """Return every planned shard of some domains, or of all, in the order of building."""
        return list(self.each_shard(self.plans if domains is None else domains))

    def each_shard(self, domains: Collection[str]) -> Iterator[ShardKey]:
        """Yield what `shards` returns."""
        for domain, plan in self.plans.items():
            for split in SPLITS if domain in domains else ():
                for number in range(shard_count(plan, split, self.spec.shard_rows)):
                    yield ShardKey(domain, split, number)

    @classmethod
    def read(cls, storage: Storage) -> Manifest:
        """Read the documents of a cache.

        Raises:
            NotACacheError: there is none.
            FormatVersionError: it is of another format version.
            CorruptCacheError: a document is not what was written.
        """
        root = Root.parse(storage.get(ROOT) or b"", storage)
        names = sorted(root.sources)
        there = storage.exist_many(map(plan_name, names))
        planned = [name for name, found in zip(names, there, strict=True) if found]
        return cls(root, {name: read_plan(storage, root.spec, name) for name in planned})


def _source(described: Any) -> dict[str, Any]:
    """Return the description of a source. Raises ValueError where its teacher is none."""
    for name, value in typed(described.get("teacher", {}), dict).items():
        typed(name, str), typed(value, str)
    return dict(typed(described, dict))


def tokenizer_file(name: Any) -> str:
    """Return the name of a file that a tokenizer can have. Raises ValueError on any other."""
    if MODEL_FILES.fullmatch(file_name(name)):
        raise ValueError(f"{name!r} is not a file of a tokenizer")
    return str(name)


def create_root(storage: Storage, root: Root) -> bool:
    """Write the root of a new cache; False where another process was first."""
    return storage.put_if_absent(ROOT, root.dump())


def write_plan(storage: Storage, spec: CacheSpec, domain: str, plan: DomainPlan) -> None:
    """Fix the rows of a domain."""
    portions = [
        {
            "documents": portion.documents,
            "tokens": portion.tokens,
            "content": portion.content,
            "rows": {split: portion.rows[split] for split in SPLITS},
        }
        | ({"padding": portion.padding, "lost": portion.lost} if "segments" in spec.arrays else {})
        for portion in plan.portions
    ]
    body = {
        "domain": domain,
        "fingerprint": spec.fingerprint,
        "portions": portions,
        "frequent_ids": list(plan.frequent_ids),
        "metadata": dict(plan.metadata),
    } | ({"passages": True} if plan.passages else {})
    storage.put(plan_name(domain), dump(body))


def read_plan(storage: Storage, spec: CacheSpec, domain: str) -> DomainPlan:
    """Read the plan of a domain. Raises CorruptCacheError where it is damaged or another's."""
    where = storage.uri(plan_name(domain))
    try:
        body = parse(read(storage, plan_name(domain)), where)
    except CorruptCacheError as error:
        again = "Remove it and 'ddk-cache build' makes the whole domain again."
        raise CorruptCacheError(f"{error} {again}") from error
    if (body.get("domain"), body.get("fingerprint")) != (domain, spec.fingerprint):
        raise CorruptCacheError(f"{where} belongs to another domain or cache.")

    def build() -> DomainPlan:
        portions = tuple(
            Portion(
                documents=typed(portion["documents"], int, 1),
                tokens=typed(portion["tokens"], int, 1),
                content=typed(portion["content"], str),
                rows={split: typed(portion["rows"][split], int, 0) for split in SPLITS},
                padding=typed(portion.get("padding", 0), int, 0),
                lost=typed(portion.get("lost", 0), int, 0),
            )
            for portion in body["portions"]
        )
        if not portions:
            raise ValueError("a plan without a portion")
        metadata = {typed(name, str): typed(text, str) for name, text in body["metadata"].items()}
        for name, text in metadata.items():
            text.encode()
            if not is_document(name):
                raise ValueError(f"{name!r} is not a Zarr document of a domain")
        known = body.get("frequent_ids", ())
        frequent = tuple(typed(number, int, 0, spec.vocab_size - 1) for number in known)
        if len(set(frequent)) != len(frequent):
            raise ValueError("a frequent id is listed twice")
        passages = typed(body.get("passages", False), bool)
        return DomainPlan(portions, metadata, frequent, passages)

    plan: DomainPlan = understand(where, build)
    for split in SPLITS:
        check_shown(storage, spec, domain, split, plan)
    return plan


def check_shown(
    storage: Storage, spec: CacheSpec, domain: str, split: str, plan: DomainPlan
) -> None:
    """Check that a plan does not claim many more shards than there are files.

    Token rows are written before their plan. A few may have been lost since, but a number without
    files behind it must not decide how long a list becomes, so some shards, evenly spaced, are
    looked for. Where files cannot be listed, the number itself is bounded.

    Raises:
        CorruptCacheError: it does.
    """
    planned = shard_count(plan, split, spec.shard_rows)
    if planned <= 1024:
        return
    if not storage.lists:
        if planned > MOST_UNLISTED:
            raise CorruptCacheError(
                f"{storage.uri(plan_name(domain))} plans {planned:,} shards of {split} rows; a "
                f"server that cannot list files may have {MOST_UNLISTED:,}. Copy the cache."
            )
        return
    keys = [ShardKey(domain, split, place * planned // LOOKED_FOR) for place in range(LOOKED_FOR)]
    there = sum(storage.exist_many(object_name(spec, key, "tokens") for key in keys))
    if there < LOOKED_FOR / 4:
        raise CorruptCacheError(
            f"{storage.uri(plan_name(domain))} plans {planned:,} shards of {split} rows, but only "
            f"{there} of {LOOKED_FOR} that were looked for exist. Remove it and 'ddk-cache build' "
            "makes the whole domain again."
        )
