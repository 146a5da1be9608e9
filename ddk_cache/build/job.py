"""The job: open or create → plan → teacher → audit → write → commit, shard by shard.

Any number of processes may do it together: each leases a domain to plan or a shard to score, and
all work until the cache is finished. With write-behind, the shard before the one that the teacher
is at is audited, compressed, flushed and committed by a thread; at most one shard waits, so memory
is bounded and a process that dies loses two shards of work at most. The same call resumes where
the last one stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ddk_cache.build.audit import audit
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.create import add_sources, make_spec, open_for_building, read_root
from ddk_cache.build.scoring import Scored, Scorer
from ddk_cache.build.share import check_rank, pause, share
from ddk_cache.build.teacher import Teacher
from ddk_cache.build.tokenize import ReadRows, grow_domain, mend_tokens, plan_domain
from ddk_cache.build.writer import ShardWriter, Stored
from ddk_cache.console import Progress
from ddk_cache.corpus.rows import token_rows
from ddk_cache.corpus.sources import Source, find_sources
from ddk_cache.errors import CacheError, CorruptCacheError, DDKError, MismatchError, StorageError
from ddk_cache.format.codec import TargetCodec
from ddk_cache.format.commit import Record, committed, parse_record
from ddk_cache.format.layout import plan_name, record_name
from ddk_cache.format.manifest import Manifest, read_plan, write_plan
from ddk_cache.format.plan import DomainPlan, Shard, ShardKey, shard_at
from ddk_cache.format.spec import TOKEN_ARRAYS
from ddk_cache.storage.base import Storage
from ddk_cache.storage.lease import Leases
from ddk_cache.storage.open import open_storage


def build_cache(
    cache: str | Path,
    sources: str | Path | Sequence[Source],
    teacher: Teacher,
    tokenizer: Any,
    config: BuildConfig = BuildConfig(),  # noqa: B008 (it is frozen)
    *,
    grow: bool = False,
    rank: int = 0,
    world: int = 1,
    write_behind: bool | None = None,
    read: ReadRows = token_rows,
) -> None:
    """Build a cache at a path or a URL, or resume a build that was stopped.

    Args:
        cache: Where the cache is, or shall be.
        sources: A corpus (a directory or a mix file), or its domains as `find_sources` gives them.
        teacher: From `load_teacher`, or any callable in a `Teacher`.
        tokenizer: The teacher's tokenizer.
        config: What the cache shall hold.
        grow: Add domains, and documents at the end of domains, that the cache does not have yet.
            If that fails, the cache stays as it was.
        rank: Which process this is, of `world`. It only spreads processes over the work.
        world: The number of processes that were given the same call.
        write_behind: Whether a thread writes a shard while the teacher scores the next one. By
            default it does unless the teacher is on the CPU, where both need the same cores.
        read: What makes rows of the documents of a source; with another one nothing can grow.

    Raises:
        InputError: a setting is out of range, or the place holds something else.
        MismatchError: the cache was begun with other settings; each is named.
        CacheError: the teacher failed, or gave something that is not a distribution.
        StorageError: the storage does not answer.
    """
    check_rank(rank, world)
    if isinstance(sources, str | Path):
        sources = find_sources(sources)
    storage = open_storage(cache)
    store = ShardWriter(storage, make_spec(config, teacher, tokenizer))
    leases = Leases(storage)
    open_for_building(store, leases, sources, teacher, tokenizer, config.batch_rows, grow)
    place = rank, world
    try:
        plan_domains(store, leases, sources, tokenizer, grow, place, read)
        score_shards(store, leases, teacher, write_behind, place)
    except KeyboardInterrupt:
        raise DDKError(stopped(storage)) from None
    finally:
        with contextlib.suppress(StorageError):  # a lease that cannot be released runs out
            leases.release_all()
        storage.clean_up()


def stopped(storage: Storage) -> str:
    """Return what to tell a person who stopped the build."""
    manifest = Manifest.read(storage)
    if len(manifest.plans) < len(manifest.root.sources):
        far = f"{len(manifest.plans)} of {len(manifest.root.sources)} domains are planned"
    else:
        keys = manifest.shards()
        pairs = {key[:2] for key in keys}
        done = sum(len(committed(storage, *pair)) for pair in pairs)
        far = f"{done} of {len(keys)} shards of {storage.uri()} are committed"
    return f"stopped: {far}. Run the same command again to resume."


# --- planning -------------------------------------------------------------------------------------


def plan_domains(
    store: ShardWriter,
    leases: Leases,
    sources: Sequence[Source],
    tokenizer: Any,
    grow: bool,
    place: tuple[int, int],
    read: ReadRows = token_rows,
) -> None:
    """Write the token rows of every domain; restore and grow those that were planned before.

    What a cache grows by is shown to readers only when all of it is planned, so a source that
    cannot be read leaves the cache as it was.
    """
    with Progress("planning", 0, "tokens") as progress:
        job = Planning(store, leases, {s.name: s for s in sources}, tokenizer, progress, read)
        known, grown = read_root(store.storage).sources, {}
        for name in filter(job.done, job.sources):
            try:
                grown[name] = job.renew(name, grow)
            except (MismatchError, CorruptCacheError):
                if name in known:
                    raise
                # Planned by a growth that failed, from other documents.
                store.storage.delete(plan_name(name))
        share(job, leases, *place)
    for name, plan in grown.items():
        if plan:
            job.fix(name, plan)
    if grow:
        add_sources(store.storage, sources)


@dataclass
class Planning:
    """A job whose items are the domains that have no plan."""

    store: ShardWriter
    leases: Leases
    sources: Mapping[str, Source]
    tokenizer: Any
    progress: Progress
    read: ReadRows = token_rows

    def todo(self) -> list[str]:
        """Return the domains without a plan."""
        return [name for name in self.sources if not self.done(name)]

    def done(self, item: str) -> bool:
        """Return whether a domain has a plan."""
        return self.store.storage.exists(plan_name(item))

    def lease(self, item: str) -> str:
        """Return the name of the lease on the plan of a domain."""
        return f"{item}.plan"

    def work(self, item: str) -> None:
        """Write the token rows of a domain, then its plan; leave nothing where that fails."""
        root = read_root(self.store.storage)
        if root.spec != self.store.spec:
            raise MismatchError(
                f"{self.store.storage.uri()}: another process builds it with other settings. "
                "Use another path."
            )
        try:
            advance = partial(self.advance, item)
            source = self.sources[item]
            self.fix(item, plan_domain(self.store, source, self.tokenizer, advance, self.read))
        except DDKError:
            self.store.clear(item)
            raise
        self.leases.release(self.lease(item))

    def flush(self) -> None:
        """Do nothing: a domain is planned when `work` returns."""

    def renew(self, name: str, grow: bool) -> DomainPlan | None:
        """Restore what is damaged of a planned domain; return its new plan where it grows.

        Raises:
            MismatchError: its documents are not those that it was planned from.
        """
        store, source = self.store, self.sources[name]
        plan = read_plan(store.storage, store.spec, name)
        store.restore_metadata(plan)
        if not grow and not store.missing_tokens(name, plan):
            return None
        while not self.leases.take(self.lease(name)):
            pause(self.leases)
        try:
            plan = read_plan(store.storage, store.spec, name)
            advance = partial(self.advance, name)
            if store.missing_tokens(name, plan):
                mend_tokens(store, source, self.tokenizer, advance, plan, self.read)
            grown = grow_domain(store, source, self.tokenizer, advance, plan) if grow else plan
        finally:
            self.leases.release(self.lease(name))
        return grown if grown != plan else None

    def fix(self, name: str, plan: DomainPlan) -> None:
        """Write the plan of a domain whose token rows are written."""
        self.store.restore_metadata(plan)
        write_plan(self.store.storage, self.store.spec, name, plan)

    def advance(self, name: str, tokens: int) -> None:
        """Count tokens of a domain as done, and renew the leases that are held."""
        self.leases.beat()
        self.progress.advance(tokens, name)


# --- scoring --------------------------------------------------------------------------------------


def score_shards(
    store: ShardWriter,
    leases: Leases,
    teacher: Teacher,
    write_behind: bool | None,
    place: tuple[int, int],
) -> None:
    """Score and commit every planned shard that is not committed."""
    spec, manifest = store.spec, Manifest.read(store.storage)
    planned = {
        key: shard_at(manifest.plans[key.domain], key.split, spec.shard_rows, key.number)
        for key in manifest.shards()
    }
    codecs = {
        domain: TargetCodec(spec, plan.frequent_ids) for domain, plan in manifest.plans.items()
    }
    scorer = Scorer(teacher, spec, manifest.root.batch_rows)
    progress = Progress("scoring", 0, "tokens")
    job = Scoring(store, leases, manifest, planned, codecs, scorer, progress)
    progress.total = sum(planned[key].rows for key in job.todo()) * spec.seq_len
    if write_behind is None:
        write_behind = teacher.device.type != "cpu"
    thread = ThreadPoolExecutor(1) if write_behind else contextlib.nullcontext()
    with progress, thread as job.writer:
        share(job, leases, *place)


@dataclass
class Scoring:
    """A job whose items are the planned shards that are not committed."""

    store: ShardWriter
    leases: Leases
    manifest: Manifest
    planned: Mapping[ShardKey, Shard]
    codecs: Mapping[str, TargetCodec]
    scorer: Scorer
    progress: Progress
    writer: ThreadPoolExecutor | None = None
    """The thread that writes behind the teacher."""
    pending: Future[None] | None = None
    """The shard that it writes."""

    def todo(self) -> list[ShardKey]:
        """Return the shards that are not committed."""
        storage = self.store.storage
        done = {pair: committed(storage, *pair) for pair in {key[:2] for key in self.planned}}
        return [key for key in self.planned if key.number not in done[key[:2]]]

    def done(self, item: ShardKey) -> bool:
        """Return whether a shard is committed."""
        return self.store.storage.exists(record_name(item))

    def lease(self, item: ShardKey) -> str:
        """Return the name of the lease on a shard."""
        return str(item).replace("/", ".")

    def work(self, item: ShardKey) -> None:
        """Score a shard, and commit it or leave that to the thread."""
        rows = self.planned[item].rows
        tokens, mask = (self.store.read(item, name, rows) for name in TOKEN_ARRAYS)
        advance = partial(self.advance, f"{item.domain}/{item.split}")
        scored = self.scorer.score(item, tokens.rows.astype(np.int64), advance)
        self.flush()
        commit = partial(self.commit, item, tokens, mask, scored, self.scorer.batch_rows)
        if self.writer:
            self.pending = self.writer.submit(commit)
        else:
            commit()

    def flush(self) -> None:
        """Wait for the shard that the thread writes, and raise what went wrong with it."""
        if self.pending:
            self.pending.result()
            self.pending = None

    def commit(
        self, key: ShardKey, tokens: Stored, mask: Stored, scored: Scored, batch_rows: int
    ) -> None:
        """Encode, audit, write and commit one shard, and release its lease."""
        codec, counted = self.codecs[key.domain], mask.rows.astype(bool)
        labels = tokens.rows[:, 1:].astype(np.int64)
        encoded = codec.encode(scored.arrays, labels)
        seen = audit(str(key), scored.arrays, encoded, labels, codec)
        objects = {"tokens": tokens.object, "loss_mask": mask.object}
        record = Record(
            key=key,
            fingerprint=self.store.spec.fingerprint,
            content=self.planned[key].content,
            rows=len(tokens.rows),
            positions=int(counted.sum()),
            teacher_loss=float(-scored.arrays["label_logprob"][counted].sum(dtype=np.float64)),
            batch_rows=batch_rows,
            audit=seen | ({"fidelity": scored.fidelity} if scored.fidelity else {}),
            objects=objects | self.store.write(key, encoded),
        )
        check_readable(record, self.manifest)
        record.write(self.store.storage)
        self.leases.release(self.lease(key))

    def advance(self, note: str, tokens: int) -> None:
        """Count tokens as scored, and renew the leases that are held."""
        self.leases.beat()
        self.progress.advance(tokens, note)


def check_readable(record: Record, manifest: Manifest) -> None:
    """Raise CacheError where a reader of the cache would refuse a record."""
    try:
        parse_record(record.dump(), "its record", manifest, record.key)
    except (CorruptCacheError, ValueError) as error:
        raise CacheError(
            f"{record.key} was not committed, because no reader would accept it: {error} Check the "
            "teacher's logits."
        ) from error
