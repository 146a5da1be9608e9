"""Copy finished caches from place to place: objects as they are, each checked by its hash.

The order is that of a build: root, plans, then for each shard its arrays and at last its record.
So a copy that was stopped is an unfinished cache, and the same call resumes it: a shard with a
record is complete and is left out. An object is held in memory as a whole, a few at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ddk_cache.console import Progress
from ddk_cache.errors import CorruptCacheError, MismatchError
from ddk_cache.format.commit import parse_record, uncommitted
from ddk_cache.format.documents import read
from ddk_cache.format.layout import ROOT, object_name, plan_name, record_name, tokenizer_name
from ddk_cache.format.manifest import Manifest, Root, create_root, read_plan, write_plan
from ddk_cache.format.place import check_place, read_root
from ddk_cache.format.plan import ShardKey
from ddk_cache.hashing import digest
from ddk_cache.read.cache import Cache, open_cache
from ddk_cache.storage.base import Storage
from ddk_cache.storage.open import open_storage
from ddk_cache.transfer.combine import Part, combine, require_equal

THREADS = 8
"""Shards copied at the same time; an object of each is in memory."""


def copy_cache(
    sources: str | Path | Sequence[str | Path],
    target: str | Path,
    *,
    domains: Collection[str] = (),
    splits: Collection[str] = (),
) -> None:
    """Copy finished caches with equal specs to one cache at a path or URL, or resume that.

    A target that holds an earlier state of the same, before a growth, is brought up to date.

    Args:
        sources: Path or URL of a cache, or several.
        target: Where the copy is, or shall be.
        domains: The domains to copy; all, where none is named.
        splits: The splits to copy; all, where none is named.

    Raises:
        InputError: the target is read-only or holds something else; see also `combine`.
        MismatchError: the caches differ, or the target holds other rows; each field is named.
        CorruptCacheError: what was read is not what was committed.
        UnfinishedCacheError: a source is not finished.
        StorageError: a place does not answer.
    """
    places = [sources] if isinstance(sources, str | Path) else sources
    with ExitStack() as stack:
        opened = [stack.enter_context(open_cache(place)) for place in places]
        storage = open_storage(target)
        stack.callback(storage.close)
        part = combine(opened, domains, splits)
        write_documents(part, storage)
        copy_shards(part, storage)
        storage.clean_up()


def write_documents(part: Part, target: Storage) -> None:
    """Write root, tokenizer, Zarr documents and plans, once what is there is known to agree."""
    root, first = part.manifest.root, next(iter(part.owners.values()))
    check_place(target)
    there = target.exists(ROOT)
    if there:
        check_target(part.manifest, target)
    else:
        create_root(target, root)
    for file, (size, hashed) in root.tokenizer_files.items():
        name = tokenizer_name(file)
        target.put(name, fetch(first.storage, name, size, hashed))
    documents = {
        n: text for plan in part.manifest.plans.values() for n, text in plan.metadata.items()
    }
    for name, text in documents.items():
        target.put(name, text.encode())
    for domain, plan in part.manifest.plans.items():
        write_plan(target, root.spec, domain, plan)
    if there:
        target.put(ROOT, root.dump())


def check_target(wanted: Manifest, target: Storage) -> None:
    """Raise MismatchError unless a cache is an earlier state of the wanted one."""
    was: Root = read_root(target)
    require_equal(target.uri(), was, "what is copied", wanted.root)
    if missing := sorted(was.sources.keys() - wanted.root.sources.keys()):
        raise MismatchError(
            f"{target.uri()} holds other domains than are copied: {', '.join(missing)}. Give "
            "another path."
        )
    for name in was.sources:
        if not target.exists(plan_name(name)):
            continue
        known, new = read_plan(target, was.spec, name).portions, wanted.plans[name].portions
        if new[: len(known)] != known:
            raise MismatchError(
                f"{target.uri()} holds other rows of {name} than are copied. Give another path."
            )


def copy_shards(part: Part, target: Storage) -> None:
    """Copy every shard that has no record at the target."""
    keys = uncommitted(target, part.manifest)
    with (
        Progress("copying", len(keys), "shards") as progress,
        ThreadPoolExecutor(THREADS, "copy") as pool,
    ):
        for size in pool.map(partial(copy_shard, part, target), keys):
            progress.advance(1, f"{size:,} bytes")


def copy_shard(part: Part, target: Storage, key: ShardKey) -> int:
    """Copy the arrays of a shard, then its record; return their bytes."""
    cache: Cache = part.owners[key.domain]
    data = read(cache.storage, record_name(key))
    record = parse_record(data, cache.storage.uri(record_name(key)), cache.manifest, key)
    for array, entry in record.objects.items():
        name = object_name(cache.spec, key, array)
        target.put(name, fetch(cache.storage, name, entry.bytes, entry.hash))
    target.put(record_name(key), data)
    return sum(entry.bytes for entry in record.objects.values())


def fetch(storage: Storage, name: str, size: int, hashed: str) -> bytes:
    """Return an object. Raises CorruptCacheError where it is not what was committed."""
    storage.check_size(name, size)
    data = read(storage, name)
    if digest(data) != hashed:
        raise CorruptCacheError(
            f"{storage.uri(name)} has changed: hash {digest(data)}, committed {hashed}. Run "
            "'ddk-cache verify'."
        )
    return data
