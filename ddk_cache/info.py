"""What a cache holds, as facts for a machine and as a table for a person.

Everything is read from the manifest and the commit records; no array is opened.
"""

from __future__ import annotations

import math
from typing import Any

from ddk_cache.reader import Cache, object_sizes
from ddk_cache.schema import SPLITS


def describe(cache: Cache) -> dict[str, Any]:
    """Return the facts of a cache as plain JSON values."""
    spec, manifest = cache.spec, cache.manifest
    domains: dict[str, dict[str, Any]] = {}
    for name in cache.domains:
        loss, positions = cache.teacher_loss(name, "validation")
        plan = cache.plan(name)
        domains[name] = {
            "documents": plan.documents,
            "rows": {split: plan.rows(split) for split in SPLITS},
            "committed_rows": {split: cache.committed_rows(name, split) for split in SPLITS},
            "train_tokens": plan.rows("train") * spec.seq_len,
            "teacher_loss": loss / positions if positions else None,
            "teacher_perplexity": math.exp(loss / positions) if positions else None,
        }
    rows = sum(sum(domain["committed_rows"].values()) for domain in domains.values())
    sizes = object_sizes(cache)
    tokens = rows * spec.seq_len
    per_token = {name: size / tokens for name, size in sizes.items()} if tokens else {}
    return {
        "path": str(cache.root),
        "fingerprint": spec.fingerprint,
        "spec": spec.to_json(),
        "provenance": dict(manifest.provenance),
        "unplanned": sorted(set(manifest.sources) - set(manifest.plans)),
        "domains": domains,
        "tokens": tokens,
        "bytes": sum(sizes.values()),
        "bytes_per_token": per_token | {"all": sum(per_token.values())},
    }


def show(facts: dict[str, Any]) -> None:
    """Print the facts as tables."""
    from rich.console import Console
    from rich.table import Table

    spec, console = facts["spec"], Console()
    console.print(f"[bold]{facts['path']}[/]  fingerprint {facts['fingerprint']}")
    console.print(
        f"{spec['targets']} of {spec['vocab_size']:,} tokens, rows of {spec['seq_len']:,}; "
        f"teacher {facts['provenance'].get('teacher')} ({spec['teacher'].get('dtype', 'callable')})"
    )
    table = Table("domain", box=None, pad_edge=False)
    for column in ("documents", "train rows", "held-out rows", "committed", "teacher perplexity"):
        table.add_column(column, justify="right")
    for name, domain in facts["domains"].items():
        planned, done = (sum(domain[key].values()) for key in ("rows", "committed_rows"))
        perplexity = domain["teacher_perplexity"]
        table.add_row(
            name,
            f"{domain['documents']:,}",
            f"{domain['rows']['train']:,}",
            f"{domain['rows']['validation']:,}",
            f"{done / planned:.0%}",
            f"{perplexity:,.2f}" if perplexity else "–",
        )
    for name in facts["unplanned"]:
        table.add_row(name, "not planned yet", "", "", "", "")
    console.print(table)
    parts = ", ".join(f"{name} {size:.2f}" for name, size in facts["bytes_per_token"].items())
    console.print(f"{facts['tokens']:,} tokens, {facts['bytes']:,} bytes; bytes a token: {parts}")
