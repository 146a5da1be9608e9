"""Which rows a cache will hold: documents are tokenised once and the rows written down.

The plan of a domain is its token rows themselves, in the store, fixed before the teacher sees the
first of them. So every shard of targets follows from bytes on disk, a build that goes on needs
neither the documents nor the tokenizer, and an edited corpus cannot shift rows half-way. The cost
is that planning reads the whole corpus; a domain that was interrupted is read again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from ddk_cache.console import Progress
from ddk_cache.corpus import Source, Tally, token_rows
from ddk_cache.manifest import Manifest
from ddk_cache.schema import SPLITS, DomainPlan, ShardKey
from ddk_cache.store import TOKEN_ARRAYS, Store


def plan_domain(
    store: Store, source: Source, tokenizer: Any, advance: Callable[[int], None]
) -> DomainPlan:
    """Write the token rows of one domain and return its plan; `advance` hears of tokens.

    Raises:
        InputError: the source cannot be read or is too short.
    """
    spec, tally = store.spec, Tally()
    store.clear(source.name)
    rows = dict.fromkeys(SPLITS, 0)
    blocks = token_rows(
        source,
        tokenizer,
        seq_len=spec.seq_len,
        holdout=spec.holdout,
        block=spec.shard_rows,
        tally=tally,
    )
    for split, tokens, loss_mask in blocks:
        key = ShardKey(source.name, split, rows[split] // spec.shard_rows)
        store.allocate(source.name, split, key.number + 1, TOKEN_ARRAYS)
        store.write(key, {"tokens": tokens, "loss_mask": loss_mask})
        rows[split] += len(tokens)
        advance(len(tokens) * spec.seq_len)
    for split, count in rows.items():
        store.allocate(source.name, split, -(-count // spec.shard_rows), spec.arrays)
    return DomainPlan(
        documents=tally.documents,
        tokens=tally.tokens,
        content=tally.content.hexdigest(),
        extents={split: (count,) if count else () for split, count in rows.items()},
    )


def plan_all(
    store: Store,
    manifest: Manifest,
    sources: list[Source],
    tokenizer: Any,
    progress: Progress,
) -> Manifest:
    """Plan every domain that has no plan yet; the manifest is replaced after each."""
    for source in sources:
        if source.name in manifest.plans:
            continue
        plan = plan_domain(
            store, source, tokenizer, functools.partial(progress.advance, note=source.name)
        )
        manifest = dataclasses.replace(manifest, plans={**manifest.plans, source.name: plan})
        manifest.write(store.root)
    return manifest
