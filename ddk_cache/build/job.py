"""The job: open or create → plan → teacher → audit → write → commit, shard by shard.

Any number of processes may do it together: each leases a domain to plan or a shard to score, and
all work until the cache is finished. With write-behind, the shard before the one that the teacher
is at is audited, compressed, flushed and committed by a thread; at most one shard waits, so memory
is bounded and a process that dies loses two shards of work at most. The same call resumes where
the last one stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from ddk_cache.build.audit import audit
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.create import add_sources, open_for_building, settled
from ddk_cache.build.scoring import Scored, Scorer, labels_inside
from ddk_cache.build.share import Part, check_rank, share
from ddk_cache.build.teacher import Teacher
from ddk_cache.build.teachers import Teachers, describe, meet
from ddk_cache.build.tokenize import ReadRows, plan_domains
from ddk_cache.build.writer import ShardWriter, Stored
from ddk_cache.console import Progress
from ddk_cache.corpus.rows import token_rows
from ddk_cache.corpus.sources import OWN, Source, find_sources
from ddk_cache.errors import CacheError, CorruptCacheError, DDKError, MismatchError, StorageError
from ddk_cache.format.codec import TargetCodec
from ddk_cache.format.commit import Record, parse_record, uncommitted
from ddk_cache.format.layout import record_name
from ddk_cache.format.manifest import Manifest
from ddk_cache.format.plan import Shard, ShardKey, shard_at
from ddk_cache.format.spec import CacheSpec
from ddk_cache.storage.base import Storage
from ddk_cache.storage.lease import Leases
from ddk_cache.storage.open import open_storage
from ddk_cache.types import Array


def build_cache(
    cache: str | Path,
    sources: str | Path | Sequence[Source],
    teacher: Teacher | Teachers,
    tokenizer: Any,
    config: BuildConfig = BuildConfig(),  # noqa: B008 (it is frozen)
    *,
    grow: bool = False,
    rank: int = 0,
    world: int = 1,
    write_behind: bool | None = None,
    stop: Event | None = None,
    read: ReadRows = token_rows,
) -> None:
    """Build a cache at a path or a URL, or resume a build that was stopped.

    Args:
        cache: Where the cache is, or shall be.
        sources: A corpus (a directory or a mix file), or its domains as `find_sources` gives them.
        teacher: From `load_teacher`, or any callable in a `Teacher`. A domain whose source names
            another teacher needs `Teachers`, which load it.
        tokenizer: The teacher's tokenizer.
        config: What the cache shall hold.
        grow: Add domains, and documents at the end of domains, that the cache does not have yet.
            If that fails, the cache stays as it was.
        rank: Which process this is, of `world`. It only spreads processes over the work.
        world: The number of processes that were given the same call.
        write_behind: Whether a thread writes a shard while the teacher scores the next one. By
            default it does unless the teacher is on the CPU, where both need the same cores.
        stop: Once another thread sets it, the build finishes the shard in hand and ends as by
            Ctrl-C, with a DDKError.
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
    config = settled(config, sources, storage)
    teachers = teacher if isinstance(teacher, Teachers) else Teachers.of(teacher, tokenizer)
    spec, others = meet(teachers, sources, tokenizer, config)
    store, leases = ShardWriter(storage, spec), Leases(storage)
    described, own = describe(sources, others), teachers.get()[0]
    most = min((other.batch_rows for other in others.values()), default=None)
    open_for_building(store, leases, described, own, tokenizer, config.batch_rows, grow, most)
    del own
    part = Part(rank, world, stop or Event())
    try:
        plan_domains(store, leases, sources, tokenizer, grow, part, read)
        if grow:
            add_sources(storage, described)
        specs = {name: other.spec for name, other in others.items()} | {OWN: spec}
        score_shards(store, leases, teachers, specs, write_behind, part)
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
        shards = len(manifest.shards())
        done = shards - len(uncommitted(storage, manifest))
        far = f"{done} of {shards} shards of {storage.uri()} are committed"
    return f"stopped: {far}. Run the same command again to resume."


# --- scoring --------------------------------------------------------------------------------------


def score_shards(
    store: ShardWriter,
    leases: Leases,
    teachers: Teachers,
    specs: Mapping[str, CacheSpec],
    write_behind: bool | None,
    part: Part,
) -> None:
    """Score and commit every planned shard that is not committed, one teacher after another.

    `specs` are those of a cache of each teacher alone, by its name. Processes begin with different
    teachers.

    Raises:
        MismatchError: a domain is of a teacher that is not among them.
    """
    manifest = Manifest.read(store.storage)
    names = {spec.fingerprint: name for name, spec in specs.items()}
    domains: dict[str, list[str]] = {}
    for domain in manifest.plans:
        fingerprint = manifest.spec_of(domain).fingerprint
        if fingerprint not in names and uncommitted(store.storage, manifest, [domain]):
            raise MismatchError(
                f"{store.storage.uri()}: domain {domain!r} has a teacher of its own, which was not "
                "given. Name it as 'teacher:' of the domain in the mix file."
            )
        domains.setdefault(names.get(fingerprint, OWN), []).append(domain)
    order = sorted(domains)
    first = part.rank * len(order) // part.world
    for name in order[first:] + order[:first]:
        if uncommitted(store.storage, manifest, domains[name]):
            teacher = teachers.get(name)[0]
            score_domains(store, leases, teacher, manifest, domains[name], write_behind, part)
            del teacher


def score_domains(
    store: ShardWriter,
    leases: Leases,
    teacher: Teacher,
    manifest: Manifest,
    domains: Sequence[str],
    write_behind: bool | None,
    part: Part,
) -> None:
    """Score and commit every planned shard of the domains of one teacher."""
    scorer = Scorer(teacher, manifest.spec_of(domains[0]), manifest.root.batch_rows)
    codecs = {name: TargetCodec(scorer.spec, manifest.plans[name].frequent_ids) for name in domains}
    progress = Progress("scoring", 0, "tokens")
    job = Scoring(store, leases, manifest, codecs, scorer, progress)
    progress.total = sum(job.planned(key).rows for key in job.todo()) * scorer.spec.seq_len
    if write_behind is None:
        write_behind = teacher.device.type != "cpu"
    thread = ThreadPoolExecutor(1) if write_behind else contextlib.nullcontext()
    with progress, thread as job.writer:
        share(job, leases, *part)


@dataclass
class Scoring:
    """A job whose items are the planned shards that are not committed."""

    store: ShardWriter
    leases: Leases
    manifest: Manifest
    codecs: Mapping[str, TargetCodec]
    """Domain → codec, of the domains that this job scores."""
    scorer: Scorer
    progress: Progress
    writer: ThreadPoolExecutor | None = None
    """The thread that writes behind the teacher."""
    pending: Future[None] | None = None
    """The shard that it writes."""

    def todo(self) -> list[ShardKey]:
        """Return the shards that are not committed, those of few rows last."""
        keys = uncommitted(self.store.storage, self.manifest, list(self.codecs))
        return sorted(keys, key=lambda key: -self.planned(key).rows)

    def planned(self, item: ShardKey) -> Shard:
        """Return what the plan says about a shard."""
        plan, size = self.manifest.plans[item.domain], self.manifest.spec.shard_rows
        return shard_at(plan, item.split, size, item.number)

    def done(self, item: ShardKey) -> bool:
        """Return whether a shard is committed."""
        return self.store.storage.exists(record_name(item))

    def lease(self, item: ShardKey) -> str:
        """Return the name of the lease on a shard."""
        return str(item).replace("/", ".")

    def work(self, item: ShardKey) -> None:
        """Score a shard, and commit it or leave that to the thread."""
        rows = self.planned(item).rows
        planned = {n: self.store.read(item, n, rows) for n in self.store.spec.token_arrays}
        tokens = planned["tokens"].rows.astype(np.int64)
        advance = partial(self.advance, f"{item.domain}/{item.split}")
        finish = self.scorer.begin(item, tokens, advance, segments_of(planned))
        self.flush()
        commit = partial(self.commit, item, planned, finish, self.scorer.batch_rows)
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
        self,
        key: ShardKey,
        planned: Mapping[str, Stored],
        finish: Callable[[], Scored],
        batch_rows: int,
    ) -> None:
        """Wait for the scores of a shard; encode, audit, write and commit it; release its lease."""
        scored = finish()
        codec, counted = self.codecs[key.domain], planned["loss_mask"].rows.astype(bool)
        tokens, segments = planned["tokens"].rows, segments_of(planned)
        labels = tokens[:, 1:].astype(np.int64)
        encoded = codec.encode(scored.arrays, labels)
        inside = ... if segments is None else labels_inside(tokens, segments)
        seen = audit(str(key), scored.arrays, encoded, labels, codec, inside)
        objects = {name: stored.object for name, stored in planned.items()}
        record = Record(
            key=key,
            fingerprint=self.scorer.spec.fingerprint,
            content=self.planned(key).content,
            rows=len(tokens),
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


def segments_of(planned: Mapping[str, Stored]) -> Array | None:
    """Return the segments (R, S+1) int64 of planned rows, where documents are kept apart."""
    return planned["segments"].rows.astype(np.int64) if "segments" in planned else None


def check_readable(record: Record, manifest: Manifest) -> None:
    """Raise CacheError where a reader of the cache would refuse a record."""
    try:
        parse_record(record.dump(), "its record", manifest, record.key)
    except (CorruptCacheError, ValueError) as error:
        raise CacheError(
            f"{record.key} was not committed, because no reader would accept it: {error} Check the "
            "teacher's logits."
        ) from error
