"""Which rows a cache will hold: documents are tokenized once and the rows stored.

The plan of a domain is its token rows themselves, in the cache, fixed before the teacher scores the
first of them. So every shard of targets follows from stored bytes, a resumed build needs neither
the documents nor the tokenizer, and an edited corpus cannot shift rows half-way. The cost is that
planning reads the whole corpus; a domain whose planning was interrupted is read again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ddk_cache.build.writer import ShardWriter
from ddk_cache.corpus.rows import Span, Tally, token_rows
from ddk_cache.corpus.sources import Source
from ddk_cache.errors import MismatchError
from ddk_cache.format.plan import DomainPlan, Portion, ShardKey, shard_count
from ddk_cache.types import SPLITS, Array

FREQUENT = 2048
"""Ids of a domain that are numbered by how often they occur. Kept ids then take about a seventh
fewer bytes; numbering all ids saves a hundredth more."""

Advance = Callable[[int], None]
"""Called with the number of tokens done since the last call."""


def plan_domain(store: ShardWriter, source: Source, tokenizer: Any, advance: Advance) -> DomainPlan:
    """Write the token rows of a domain and return its plan.

    Raises:
        InputError: the source cannot be read, is too short, or has no token that counts.
    """
    store.clear(source.name)
    counts = np.zeros(store.spec.vocab_size, np.int64)
    tally = Tally()
    portion = _write_portion(store, source, tokenizer, advance, None, Span(), tally, counts=counts)
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
    store: ShardWriter, source: Source, tokenizer: Any, advance: Advance, plan: DomainPlan
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
        made = _write_portion(store, cut, tokenizer, advance, before, span, tally, wanted)
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
    counts: Array | None = None,
) -> Portion:
    """Write the token rows of a span of documents after those of a plan; return their portion.

    With `wanted`, only those shards are written. Occurrences of ids are added to `counts` (V).
    """
    spec, rows = store.spec, dict.fromkeys(SPLITS, 0)
    first = {s: shard_count(before, s, spec.shard_rows) if before else 0 for s in SPLITS}
    blocks = token_rows(
        source,
        tokenizer,
        seq_len=spec.seq_len,
        holdout=spec.holdout,
        block=spec.shard_rows,
        tally=tally,
        span=span,
    )
    for split, tokens, loss_mask in blocks:
        key = ShardKey(source.name, split, first[split] + rows[split] // spec.shard_rows)
        if wanted is None or key in wanted:
            store.write(key, {"tokens": tokens, "loss_mask": loss_mask})
        if counts is not None:
            counts += np.bincount(tokens.ravel(), minlength=len(counts))
        rows[split] += len(tokens)
        advance(len(tokens) * spec.seq_len)
    return Portion(tally.documents, tally.tokens, tally.content.hexdigest(), rows)


def _with_metadata(store: ShardWriter, domain: str, plan: DomainPlan) -> DomainPlan:
    """Return the plan with its Zarr documents, both of which the caller writes."""
    return dataclasses.replace(plan, metadata=store.metadata(domain, plan))
