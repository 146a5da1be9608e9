"""What a copy holds: domains and splits of one cache, or of several that agree, as one manifest.

Caches agree if their specs and their tokenizers are equal. All that a shard's record refers to
stays as it is, so nothing is decoded. Where a split is left out, its Zarr documents must show no
rows, and are made anew.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddk_cache.errors import InputError, MismatchError, UnknownNameError, unknown
from ddk_cache.format.manifest import Manifest, Root
from ddk_cache.format.plan import DomainPlan
from ddk_cache.format.spec import CacheSpec
from ddk_cache.read.cache import Cache
from ddk_cache.read.split import check_split
from ddk_cache.storage.local import LocalStorage
from ddk_cache.types import SPLITS


@dataclass(frozen=True)
class Part:
    """A cache to be made of others."""

    manifest: Manifest
    owners: Mapping[str, Cache]
    """Domain → the cache that it comes from."""


def combine(
    caches: Sequence[Cache], domains: Collection[str] = (), splits: Collection[str] = ()
) -> Part:
    """Return what a copy of caches holds: the named domains and splits, or all.

    Raises:
        UnknownNameError: no cache has such a domain or split.
        InputError: two caches have the same domain.
        MismatchError: the caches differ in spec or tokenizer; each field is named.
    """
    first = caches[0].manifest.root
    for other in caches[1:]:
        require_equal(caches[0].uri, first, other.uri, other.manifest.root)
    for split in splits:
        check_split(split, caches[0].uri)
    owners: dict[str, Cache] = {}
    for cache in caches:
        for name in cache.manifest.root.sources:
            if domains and name not in domains:
                continue
            if name in owners:
                raise InputError(
                    f"domain {name!r} is in {owners[name].uri} and in {cache.uri}, expected in "
                    "one. Leave one of them out with --domains, in a copy of its own."
                )
            owners[name] = cache
    for name in domains:
        if name not in owners:
            known = [name for cache in caches for name in cache]
            raise UnknownNameError(f"{caches[0].uri}: {unknown('domain', name, known)}")
    sources = {name: cache.manifest.root.sources[name] for name, cache in owners.items()}
    root = dataclasses.replace(first, sources=sources)
    plans = {name: owners[name].plan(name) for name in sorted(owners)}
    if splits and set(splits) != set(SPLITS):
        plans = {name: without(root.spec, name, plan, splits) for name, plan in plans.items()}
    return Part(Manifest(root, plans), owners)


def require_equal(where: str, one: Root, place: str, other: Root) -> None:
    """Raise MismatchError naming each field in which the specs or tokenizers of caches differ."""
    was, now = (
        root.spec.to_json() | {"tokenizer_files": dict(root.tokenizer_files)}
        for root in (one, other)
    )
    differences = [
        f"  {name}: {was[name]} and {now[name]}" for name in was if was[name] != now[name]
    ]
    if differences:
        raise MismatchError(
            f"{where} and {place} cannot be one cache, for they differ in\n"
            + "\n".join(differences)
        )


def without(spec: CacheSpec, domain: str, plan: DomainPlan, splits: Collection[str]) -> DomainPlan:
    """Return the plan of a domain of which only some splits are kept."""
    from ddk_cache.build.writer import ShardWriter

    portions = tuple(
        dataclasses.replace(
            portion,
            rows={split: rows if split in splits else 0 for split, rows in portion.rows.items()},
        )
        for portion in plan.portions
    )
    kept = dataclasses.replace(plan, portions=portions)
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(LocalStorage(Path(folder)), spec)
        return dataclasses.replace(kept, metadata=writer.metadata(domain, kept))
