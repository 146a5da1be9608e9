"""The job: open or create → plan → teacher → audit → write → commit, shard by shard.

Any number of processes may do it together: each claims a domain to plan or a shard to score, and
all go on until the cache is finished. While a teacher on an accelerator works on a shard, the one
before it is audited, compressed, flushed and committed by a thread; at most one shard waits, so
memory is bounded and a process that dies loses two shards of work at most. The same call goes on
where the last one stopped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ddk_cache.build.audit import audit
from ddk_cache.build.create import open_for_building
from ddk_cache.build.scoring import Scored, Scorer
from ddk_cache.build.teacher import Teacher
from ddk_cache.build.tokenize import Advance, grow_domain, mend_tokens, plan_domain
from ddk_cache.build.writer import ShardWriter
from ddk_cache.console import Progress
from ddk_cache.corpus.sources import Source
from ddk_cache.errors import DDKError, InputError, StorageError
from ddk_cache.format.codec import LogprobCodec, TargetCodec
from ddk_cache.format.commit import committed
from ddk_cache.format.layout import plan_name, record_name
from ddk_cache.format.manifest import Manifest, read_plan, write_plan
from ddk_cache.format.plan import Shard, ShardKey, shard_at
from ddk_cache.format.spec import CacheSpec, TargetSpec
from ddk_cache.hf import identify_tokenizer
from ddk_cache.storage.base import Storage
from ddk_cache.storage.lease import Leases
from ddk_cache.storage.open import open_storage
from ddk_cache.types import Array

CHUNK_TOKENS = 4096
"""Tokens in a chunk, about: enough to compress well, little to read for one row."""

SHARD_TOKENS = 2**18
"""Tokens in a shard, about: the work lost when a build is killed."""

POLL = 0.5
"""Seconds between two looks at what other processes have finished."""

Job = TypeVar("Job")


def make_spec(
    teacher: Teacher,
    tokenizer: Any,
    *,
    seq_len: int = 1024,
    target_spec: str = "sampled:16",
    holdout: float = 0.05,
    chunk_rows: int | None = None,
    shard_rows: int | None = None,
    temperatures: Sequence[float] = (),
    seed: int = 0,
    compression: str = "small",
) -> CacheSpec:
    """Return the spec of a cache. Raises InputError where a setting is out of range."""
    if len(tokenizer) > teacher.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer):,} tokens and the teacher only "
            f"{teacher.vocab_size:,} outputs: they do not belong together."
        )
    chunk_rows = chunk_rows or max(1, CHUNK_TOKENS // seq_len)
    return CacheSpec(
        seq_len=seq_len,
        vocab_size=teacher.vocab_size,
        targets=TargetSpec.parse(target_spec),
        holdout=holdout,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows or max(1, SHARD_TOKENS // seq_len // chunk_rows) * chunk_rows,
        logprob_step=LogprobCodec().step,
        teacher=teacher.identity,
        tokenizer=identify_tokenizer(tokenizer),
        temperatures=tuple(sorted({float(t) for t in temperatures} - {1.0})),
        seed=seed,
        compression=compression,
    )


def build(
    cache: str | Path,
    sources: Sequence[Source],
    teacher: Teacher,
    tokenizer: Any,
    *,
    batch_rows: int | None = None,
    grow: bool = False,
    rank: int = 0,
    world: int = 1,
    **settings: Any,
) -> None:
    """Build a cache at a path or a URL, or go on with one that was stopped.

    `settings` are those of `make_spec`.

    `grow` adds domains, and documents at the end of domains, that the cache does not have yet.
    `rank` and `world` only spread processes over the work; any number may be there or not.

    Raises:
        InputError: a setting is out of range, or the place holds something else.
        MismatchError: the cache was begun with other settings; each is named.
        CacheError: the teacher failed, or gave something that is no distribution.
        StorageError: the store does not answer.
    """
    spec = make_spec(teacher, tokenizer, **settings)
    storage = open_storage(cache)
    open_for_building(storage, spec, sources, teacher, tokenizer, batch_rows, grow)
    job = Work(storage, ShardWriter(storage, spec), Leases(storage), rank, world)
    try:
        manifest = job.plan(sources, tokenizer, grow)
        job.score(manifest, teacher)
    except KeyboardInterrupt:
        raise DDKError(job.stopped()) from None
    finally:
        job.close()


@dataclass
class Work:
    """One process at work on a cache."""

    storage: Storage
    store: ShardWriter
    claims: Leases
    rank: int
    world: int
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    pending: Future[None] | None = None

    def plan(self, sources: Sequence[Source], tokenizer: Any, grow: bool) -> Manifest:
        """Have every domain planned by whoever is first; mend and grow those that were."""
        planned = Manifest.read(self.storage).plans
        by_name = {source.name: source for source in sources}
        spec = self.store.spec
        with Progress("planning", 0, "tokens") as progress:

            def make(name: str) -> None:
                advance = partial(self._advance, progress, note=name)
                plan = plan_domain(self.store, by_name[name], tokenizer, advance)
                write_plan(self.storage, spec, name, plan)

            for name in planned.keys() & by_name.keys():
                advance = partial(self._advance, progress, note=name)
                self._renew(by_name[name], tokenizer, advance, grow)
            self._share(
                lambda: [name for name in by_name if not self.storage.exists(plan_name(name))],
                lambda name: self.storage.exists(plan_name(name)),
                lambda name: f"{name}.plan",
                make,
            )
        return Manifest.read(self.storage)

    def _renew(self, source: Source, tokenizer: Any, advance: Advance, grow: bool) -> None:
        """Mend what is damaged of a planned domain, and grow it where that is asked for."""
        store, name = self.store, source.name
        plan = read_plan(self.storage, store.spec, name)
        store.restore_metadata(plan)
        if not grow and not store.missing_tokens(name, plan):
            return
        while not self.claims.take(f"{name}.plan"):
            time.sleep(POLL)
        plan = read_plan(self.storage, store.spec, name)
        if store.missing_tokens(name, plan):
            mend_tokens(store, source, tokenizer, advance, plan)
        if grow:
            grown = grow_domain(store, source, tokenizer, advance, plan)
            if grown != plan:
                write_plan(self.storage, store.spec, name, grown)
        self.claims.release(f"{name}.plan")

    def score(self, manifest: Manifest, teacher: Teacher) -> None:
        """Have every planned shard scored and committed, by whoever is first."""
        spec = self.store.spec
        planned = {
            key: shard_at(manifest.plans[key.domain], key.split, spec.shard_rows, key.number)
            for key in manifest.shards()
        }
        scorer = Scorer(teacher, spec, manifest.root.batch_rows)
        codecs = {
            domain: TargetCodec(spec, plan.frequent_ids) for domain, plan in manifest.plans.items()
        }
        total = sum(planned[key].rows for key in self._todo(planned)) * spec.seq_len
        with Progress("scoring", total, "tokens") as progress:
            self._share(
                lambda: self._todo(planned),
                lambda key: self.storage.exists(record_name(key)),
                lambda key: str(key).replace("/", "."),
                lambda key: self._score(key, planned[key], scorer, codecs[key.domain], progress),
            )

    def _todo(self, planned: Mapping[ShardKey, Shard]) -> list[ShardKey]:
        """Return the shards that are not committed."""
        done = {pair: committed(self.storage, *pair) for pair in {key[:2] for key in planned}}
        return [key for key in planned if key.number not in done[key[:2]]]

    def _score(
        self, key: ShardKey, shard: Shard, scorer: Scorer, codec: TargetCodec, progress: Progress
    ) -> None:
        """Score one shard and leave it to the writer."""
        tokens = self.store.read(key, "tokens", shard.rows).astype(np.int64)
        note = f"{key.domain}/{key.split}"
        scored = scorer.score(key, tokens, partial(self._advance, progress, note=note))
        self._settle()
        finish = partial(self._finish, key, shard, tokens, scored, codec, scorer.batch_rows)
        if scorer.teacher.device.type == "cpu":
            finish()  # a thread would only take cores from the teacher
        else:
            self.pending = self.writer.submit(finish)

    def _finish(
        self,
        key: ShardKey,
        shard: Shard,
        tokens: Array,
        scored: Scored,
        codec: TargetCodec,
        batch_rows: int,
    ) -> None:
        """Encode, audit, write and commit one shard."""
        scores, vocab_size = scored.arrays, self.store.spec.vocab_size
        mask = self.store.read(key, "loss_mask", shard.rows).astype(bool)
        stored = codec.encode(scores, tokens[:, 1:])
        seen = audit(key, scores, stored, tokens[:, 1:], codec, vocab_size)
        self.store.write(key, stored)
        self.store.commit(
            key,
            content=shard.content,
            rows=shard.rows,
            positions=int(mask.sum()),
            teacher_loss=float(-scores["label_logprob"][mask].sum(dtype=np.float64)),
            batch_rows=batch_rows,
            audit=seen | {"fidelity": scored.fidelity},
        )
        self.claims.release(str(key).replace("/", "."))

    def _advance(self, progress: Progress, amount: int, note: str = "") -> None:
        self.claims.beat()
        progress.advance(amount, note)

    def _share(
        self,
        todo: Callable[[], list[Job]],
        done: Callable[[Job], bool],
        name: Callable[[Job], str],
        work: Callable[[Job], None],
    ) -> None:
        """Do jobs until none is left to do, by us or by others.

        Ranks begin at different places, so that they seldom meet; whoever is ready early takes
        what is left, and what a dead process had claimed.
        """
        while jobs := todo():
            first = self.rank * len(jobs) // self.world
            worked = False
            for job in jobs[first:] + jobs[:first]:
                if done(job) or not self.claims.take(name(job)):
                    continue
                if done(job):  # it was finished and released in between
                    self.claims.release(name(job))
                    continue
                work(job)
                worked = True
                if self.pending is None:
                    self.claims.release(name(job))
            self._settle()
            if not worked:
                self.claims.beat()
                time.sleep(POLL)

    def _settle(self) -> None:
        """Wait for the shard that is being written, and raise what went wrong with it."""
        if self.pending:
            self.pending.result()
            self.pending = None

    def stopped(self) -> str:
        """Return what to tell a person who stopped the build."""
        manifest = Manifest.read(self.storage)
        if len(manifest.plans) < len(manifest.root.sources):
            far = f"{len(manifest.plans)} of {len(manifest.root.sources)} domains are planned"
        else:
            keys = manifest.shards()
            pairs = {key[:2] for key in keys}
            done = sum(len(committed(self.storage, *pair)) for pair in pairs)
            far = f"{done} of {len(keys)} shards of {self.storage.uri()} are committed"
        return f"stopped: {far}. Run the same command again to go on."

    def close(self) -> None:
        """Leave nothing behind but what is committed; the last process also tidies up."""
        self.writer.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(StorageError):  # claims that cannot be given back run out
            self.claims.release_all()
        self.storage.clean_up()
