"""What a cache holds, as facts for a machine and as a table for a person.

Everything is read from the manifest and the commit records; no array is opened.
"""

from __future__ import annotations

import math
from typing import Any

from ddk_cache.format.audit_summary import total
from ddk_cache.read.cache import Cache, object_sizes
from ddk_cache.types import SPLITS

HELD = ("documents", "train\nrows", "held-out\nrows", "done", "teacher\nperplexity")
"""What a domain holds, and what the teacher makes of its held-out rows."""

SEEN = (
    *("top-1\nright", "entropy,\nnats", "kept mass\n1 % … 50 %"),
    *("KL lost,\nnats", "total\nvariation", "gradient\nerror²"),
)
"""What was seen of the teacher while its targets were written, and what they lose of it; see
`ddk_cache.build.fidelity`."""


def describe(cache: Cache) -> dict[str, Any]:
    """Return the facts of a cache as plain JSON values."""
    spec, root = cache.spec, cache.manifest.root
    domains = {name: _domain(cache, name) for name in cache.domains}
    rows = sum(sum(domain["committed_rows"].values()) for domain in domains.values())
    sizes = object_sizes(cache)
    tokens = rows * spec.seq_len
    per_token = {name: size / tokens for name, size in sizes.items()} if tokens else {}
    return {
        "path": cache.where,
        "fingerprint": spec.fingerprint,
        "spec": spec.to_json(),
        "batch_rows": root.batch_rows,
        "provenance": dict(root.provenance),
        "unplanned": sorted(set(root.sources) - set(cache.domains)),
        "domains": domains,
        "tokens": tokens,
        "bytes": sum(sizes.values()),
        "bytes_per_token": per_token | {"all": sum(per_token.values())},
    }


def _domain(cache: Cache, name: str) -> dict[str, Any]:
    plan = cache.plan(name)
    loss, positions = cache.teacher_loss(name, "validation")
    records = [record for split in SPLITS for record in cache.records(name, split)]
    return {
        "documents": plan.documents,
        "tokens": plan.tokens,
        "content": plan.content,
        "portions": len(plan.portions),
        "rows": {split: plan.rows(split) for split in SPLITS},
        "committed_rows": {split: cache.committed_rows(name, split) for split in SPLITS},
        "teacher_loss": loss / positions if positions else None,
        "teacher_perplexity": math.exp(loss / positions) if positions else None,
        "seen": total(record.audit for record in records),
    }


def show(facts: dict[str, Any]) -> None:
    """Print the facts as tables."""
    from rich.console import Console
    from rich.table import Table

    spec, console = facts["spec"], Console()
    teacher, dtype = facts["provenance"].get("teacher"), spec["teacher"].get("dtype", "callable")
    console.print(f"[bold]{facts['path']}[/]  fingerprint {facts['fingerprint']}")
    console.print(
        f"{spec['targets']} of {spec['vocab_size']:,} tokens, rows of {spec['seq_len']:,}; "
        f"teacher {teacher} ({dtype})"
    )
    for columns, row in ((HELD, _held), (SEEN, _seen)):
        table = Table("domain", box=None, pad_edge=False)
        for column in columns:
            table.add_column(column, justify="right")
        for name, domain in facts["domains"].items():
            table.add_row(name, *row(domain))
        console.print(table, "")
    if facts["unplanned"]:
        console.print(f"not planned yet: {', '.join(facts['unplanned'])}")
    parts = ", ".join(f"{name} {size:.2f}" for name, size in facts["bytes_per_token"].items())
    console.print(f"{facts['tokens']:,} tokens, {facts['bytes']:,} bytes; bytes a token: {parts}")


def _held(domain: dict[str, Any]) -> list[str]:
    """Return the figures of `HELD`."""
    planned, done = (sum(domain[key].values()) for key in ("rows", "committed_rows"))
    perplexity = domain["teacher_perplexity"]
    return [
        f"{domain['documents']:,}",
        f"{domain['rows']['train']:,}",
        f"{domain['rows']['validation']:,}",
        f"{done / planned:.0%}",
        f"{perplexity:,.2f}" if perplexity else "–",
    ]


def _seen(domain: dict[str, Any]) -> list[str]:
    """Return the figures of `SEEN`."""
    seen = domain["seen"]
    if not seen:
        return ["–"] * len(SEEN)
    mass, lost = seen["kept_mass_quantiles"], seen["fidelity"]
    return [
        f"{seen['accuracy']:.1%}",
        f"{seen['entropy']:.2f}",
        f"{mass['0.01']:.2f} … {mass['0.5']:.2f}",
        f"{lost['kl']:.4f}" if lost.get("kl") else "–",
        f"{lost['total_variation']:.3f}" if lost else "–",
        f"{lost['gradient_error']:.4f}" if lost else "–",
    ]
