"""Which rows a cache will hold: documents are tokenized once and the rows stored.

The plan of a domain is its token rows themselves, in the cache, fixed before the teacher scores the
first of them. So every shard of targets follows from stored bytes, a resumed build needs neither
the documents nor the tokenizer, and an edited corpus cannot shift rows half-way. The cost is that
planning reads the whole corpus; a domain whose planning was interrupted is read again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any

import numpy as np

from ddk_cache.build.share import Part, pause, share
from ddk_cache.build.writer import ShardWriter
from ddk_cache.console import Progress
from ddk_cache.corpus.rows import Span, Tally, token_rows
from ddk_cache.corpus.sources import Source
from ddk_cache.errors import CorruptCacheError, DDKError, MismatchError
from ddk_cache.format.layout import plan_name
from ddk_cache.format.manifest import read_plan, write_plan
from ddk_cache.format.place import read_root
from ddk_cache.format.plan import DomainPlan, Portion, ShardKey, shard_count
from ddk_cache.storage.lease import Leases
from ddk_cache.types import SPLITS, Array

FREQUENT = 2048
"""Ids of a domain that are numbered by how often they occur. Kept ids then take about a seventh
fewer bytes; numbering all ids saves a hundredth more."""

Advance = Callable[[int], None]
"""Called with the number of tokens done since the last call."""

ReadRows = Callable[..., Iterator[tuple[str, dict[str, Array]]]]
"""What turns the documents of a source into rows; `token_rows` describes it."""


def plan_domain(
    store: ShardWriter,
    source: Source,
    tokenizer: Any,
    advance: Advance,
    read: ReadRows = token_rows,
) -> DomainPlan:
    """Write the token rows of a domain and return its plan.

    Raises:
        InputError: the source cannot be read, is too short, or has no token that counts.
    """
    store.clear(source.name)
    counts = np.zeros(store.spec.vocab_size, np.int64)
    tally = Tally()
    portion = _write_portion(
        store, source, tokenizer, advance, None, Span(), tally, read=read, counts=counts
    )
    frequent = np.argsort(-counts, kind="stable")[:FREQUENT]
    ids = tuple(frequent[counts[frequent] > 0].tolist())
    plan = DomainPlan((portion,), frequent_ids=ids, passages=tally.passages)
    return _with_metadata(store, source.name, plan)


def grow_domain(
    store: ShardWriter, source: Source, tokenizer: Any, advance: Advance, plan: DomainPlan
) -> DomainPlan:
    """Write the rows of the documents that a domain has beyond its plan, and return the new plan.

    Raises:
        InputError: the source cannot be read.
        MismatchError: its first documents differ from those that the cache was built from.
    """
    span = Span(plan.documents, None, plan.content, plan.tokens, plan.passages)
    portion = _write_portion(store, source, tokenizer, advance, plan, span, Tally())
    if portion.documents == plan.documents:
        return plan
    grown = dataclasses.replace(plan, portions=(*plan.portions, portion))
    return _with_metadata(store, source.name, grown)


def mend_tokens(
    store: ShardWriter,
    source: Source,
    tokenizer: Any,
    advance: Advance,
    plan: DomainPlan,
    read: ReadRows = token_rows,
) -> None:
    """Write token rows of a planned domain again where they are missing.

    Raises:
        InputError: the source cannot be read.
        MismatchError: the documents are no longer those of the plan.
    """
    wanted, before = store.missing_tokens(source.name, plan), None
    for number, portion in enumerate(plan.portions):
        last = before.portions[-1] if before else Portion(0, 0, "", {})
        stop, tally = portion.documents, Tally()
        span = Span(last.documents, stop, last.content, last.tokens, plan.passages)
        cut = dataclasses.replace(source, tokens=portion.tokens)  # as it was, if it was cut
        made = _write_portion(store, cut, tokenizer, advance, before, span, tally, wanted, read)
        if made != portion:
            raise MismatchError(
                f"domain {source.name!r} ({source.place}): its documents differ from those that "
                "the cache was planned from, so its missing token rows cannot be made again. "
                "Restore the documents."
            )
        before = DomainPlan(plan.portions[: number + 1])


def _write_portion(
    store: ShardWriter,
    source: Source,
    tokenizer: Any,
    advance: Advance,
    before: DomainPlan | None,
    span: Span,
    tally: Tally,
    wanted: set[ShardKey] | None = None,
    read: ReadRows = token_rows,
    counts: Array | None = None,
) -> Portion:
    """Write the token rows of a span of documents after those of a plan; return their portion.

    With `wanted`, only those shards are written. Occurrences of ids are added to `counts` (V).
    """
    spec, rows = store.spec, dict.fromkeys(SPLITS, 0)
    first = {s: shard_count(before, s, spec.shard_rows) if before else 0 for s in SPLITS}
    blocks = read(
        source,
        tokenizer,
        spec,
        block=spec.shard_rows,
        tally=tally,
        span=span,
    )
    for split, arrays in blocks:
        key = ShardKey(source.name, split, first[split] + rows[split] // spec.shard_rows)
        if wanted is None or key in wanted:
            store.write(key, arrays)
        if counts is not None:
            counts += np.bincount(arrays["tokens"].ravel(), minlength=len(counts))
        rows[split] += len(arrays["tokens"])
        advance(len(arrays["tokens"]) * spec.seq_len)
    content = tally.content.hexdigest()
    return Portion(tally.documents, tally.tokens, content, rows, tally.padding, tally.lost)


def _with_metadata(store: ShardWriter, domain: str, plan: DomainPlan) -> DomainPlan:
    """Return the plan with its Zarr documents, both of which the caller writes."""
    return dataclasses.replace(plan, metadata=store.metadata(domain, plan))


# --- the job --------------------------------------------------------------------------------------


def plan_domains(
    store: ShardWriter,
    leases: Leases,
    sources: Sequence[Source],
    tokenizer: Any,
    grow: bool,
    part: Part,
    read: ReadRows = token_rows,
) -> None:
    """Write the token rows of every domain; restore and grow those that were planned before.

    What a cache grows by is shown to readers only when all of it is planned, so a source that
    cannot be read leaves the cache as it was.
    """
    with Progress("planning", 0, "tokens") as progress:
        by_name = {source.name: source for source in sources}
        job = Planning(store, leases, by_name, tokenizer, progress, part.stop, read)
        known, grown = read_root(store.storage).sources, {}
        for name in filter(job.done, job.sources):
            try:
                grown[name] = job.renew(name, grow)
            except (MismatchError, CorruptCacheError):
                if name in known:
                    raise
                # Planned by a growth that failed, from other documents.
                store.storage.delete(plan_name(name))
        share(job, leases, *part)
    for name, plan in grown.items():
        if plan:
            job.fix(name, plan)


@dataclass
class Planning:
    """A job whose items are the domains that have no plan."""

    store: ShardWriter
    leases: Leases
    sources: Mapping[str, Source]
    tokenizer: Any
    progress: Progress
    stop: Event
    """Set once the rows of a domain shall be left unfinished: they are made again."""
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
            advance, source = partial(self.advance, item), self.sources[item]
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
        if self.stop.is_set():
            raise KeyboardInterrupt
        self.leases.beat()
        self.progress.advance(tokens, name)
