"""Which rows a cache will hold: documents are tokenised once and the rows written down.

The plan of a domain is its token rows themselves, in the store, fixed before the teacher sees the
first of them. So every shard of targets follows from bytes on disk, a build that goes on needs
neither the documents nor the tokenizer, and an edited corpus cannot shift rows half-way. The cost
is that planning reads the whole corpus; a domain that was interrupted is read again.
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
"""Ids of a domain that get numbers of their own by how often they occur. LRU ids then cost about
a seventh less; numbering all ids gains a hundredth more."""

Advance = Callable[[int], None]
"""Hears of tokens as they are done."""


def plan_domain(store: ShardWriter, source: Source, tokenizer: Any, advance: Advance) -> DomainPlan:
    """Write the token rows of a domain and return its plan.

    Raises:
        InputError: the source cannot be read or is too short.
    """
    store.clear(source.name)
    counts = np.zeros(store.spec.vocab_size, np.int64)
    portion = _write_portion(store, source, tokenizer, advance, None, Span(), counts=counts)
    frequent = np.argsort(-counts, kind="stable")[:FREQUENT]
    ids = tuple(frequent[counts[frequent] > 0].tolist())
    plan = DomainPlan((portion,), frequent_ids=ids)
    return _with_metadata(store, source.name, plan)


def grow_domain(
    store: ShardWriter, source: Source, tokenizer: Any, advance: Advance, plan: DomainPlan
) -> DomainPlan:
    """Write the rows of the documents that a domain has beyond its plan, and return the new plan.

    Raises:
        MismatchError: its first documents are not those that the cache was built from.
    """
    span = Span(skip=plan.documents, content=plan.content, tokens=plan.tokens)
    portion = _write_portion(store, source, tokenizer, advance, plan, span)
    if portion.documents == plan.documents:
        return plan
    grown = dataclasses.replace(plan, portions=(*plan.portions, portion))
    return _with_metadata(store, source.name, grown)


def mend_tokens(
    store: ShardWriter, source: Source, tokenizer: Any, advance: Advance, plan: DomainPlan
) -> None:
    """Write token rows of a planned domain again where they are missing.

    Raises:
        MismatchError: the documents are no longer those of the plan.
    """
    wanted, before = store.missing_tokens(source.name, plan), None
    for number, portion in enumerate(plan.portions):
        last = before.portions[-1] if before else Portion(0, 0, "", {})
        span = Span(last.documents, portion.documents, last.content, last.tokens)
        made = _write_portion(store, source, tokenizer, advance, before, span, wanted)
        if made != portion:
            raise MismatchError(
                f"domain {source.name!r} ({source.place}): its documents are not those that the "
                "cache was planned from, so its damaged token rows cannot be made again."
            )
        before = DomainPlan(plan.portions[: number + 1])


def _write_portion(
    store: ShardWriter,
    source: Source,
    tokenizer: Any,
    advance: Advance,
    before: DomainPlan | None,
    span: Span,
    wanted: set[ShardKey] | None = None,
    counts: Array | None = None,
) -> Portion:
    """Write the token rows of a span of documents behind those of a plan.

    With `wanted`, only those shards are written. The tokens are added to `counts` (V).
    """
    spec, tally, rows = store.spec, Tally(), dict.fromkeys(SPLITS, 0)
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
