"""What a cache holds, as facts for a machine and as tables for a person.

Everything is read from the manifest and the commit records, each record once; no array is opened.
Figures are never cut to fit: where a table is wider than the terminal, each domain is a list.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypedDict

from ddk_cache.corpus.passages import passages_note
from ddk_cache.format.audit_summary import total
from ddk_cache.format.commit import Record
from ddk_cache.read.cache import Cache
from ddk_cache.types import SPLITS, TRAIN, VALIDATION

HELD = ("documents", "train\nrows", "held-out\nrows", "done", "teacher\nperplexity")
"""What a domain holds, and the teacher's perplexity on its held-out rows."""

SEEN = (
    *("top-1\nright", "entropy,\nnats", "kept mass\n1 % … 50 %"),
    *("KL lost,\nnats", "total\nvariation", "gradient\nerror²"),
)
"""Statistics of the teacher taken while its targets were written, and what the targets lose; see
`ddk_cache.build.fidelity`."""

PACKED = ("padding", "left out")
"""Where documents are kept apart: the share of the rows that is padding, and of all tokens that is
in no row, because its document is longer than one."""

WIDE = 1000
"""Columns that no table needs, so that rich cuts nothing."""


class DomainFacts(TypedDict):
    """One domain of a cache."""

    documents: int
    tokens: int
    passages: bool
    content: str
    portions: int
    teacher: str
    """Name of its teacher."""
    rows: dict[str, int]
    padding: float
    """Share of the tokens in the rows."""
    lost: float
    """Share of the tokens of all documents that is in no row."""
    committed_rows: dict[str, int]
    teacher_loss: float | None
    """Mean nats per counted held-out position."""
    teacher_perplexity: float | None
    seen: dict[str, Any]
    """What `ddk_cache.format.audit_summary.total` returns."""


class Facts(TypedDict):
    """A cache, as plain JSON values."""

    path: str
    fingerprint: str
    spec: dict[str, Any]
    batch_rows: int
    provenance: dict[str, str]
    domain_teachers: dict[str, dict[str, str]]
    """Identities of the teachers of single domains."""
    unplanned: list[str]
    domains: dict[str, DomainFacts]
    tokens: int
    """Committed positions."""
    bytes: int
    bytes_per_token: dict[str, float]
    warnings: list[str]


def describe(cache: Cache) -> Facts:
    """Return the facts of a cache. Raises CorruptCacheError where a record is damaged."""
    spec, root = cache.spec, cache.manifest.root
    sizes: Counter[str] = Counter(dict.fromkeys(spec.arrays, 0))
    domains = {}
    for name in cache.domains:
        records = {split: list(cache.records(name, split)) for split in SPLITS}
        domains[name] = _domain(cache, name, records)
        for record in (record for found in records.values() for record in found):
            sizes.update({array: entry.bytes for array, entry in record.objects.items()})
    tokens = spec.seq_len * sum(sum(facts["committed_rows"].values()) for facts in domains.values())
    per_token = {name: size / tokens for name, size in sizes.items()} if tokens else {}
    return {
        "path": cache.uri,
        "fingerprint": spec.fingerprint,
        "spec": spec.to_json(),
        "batch_rows": root.batch_rows,
        "provenance": dict(root.provenance),
        "domain_teachers": {n: t for n, t in cache.manifest.teachers.items() if n in domains},
        "unplanned": sorted(set(root.sources) - set(cache.domains)),
        "domains": domains,
        "tokens": tokens,
        "bytes": sum(sizes.values()),
        "bytes_per_token": per_token | {"all": sum(per_token.values())},
        "warnings": [
            f"{name} has no {what} rows; {effect}."
            for split, what, effect in (
                (TRAIN, "training", "nothing can be learned from it"),
                (
                    VALIDATION,
                    "held-out",
                    "its gap is that of unseen training rows (--holdout, more documents)",
                ),
            )
            for name, facts in domains.items()
            if not facts["rows"][split]
        ],
    }


def _domain(cache: Cache, name: str, records: dict[str, list[Record]]) -> DomainFacts:
    plan, held_out, root = cache.plan(name), records[VALIDATION], cache.manifest.root
    positions = sum(record.positions for record in held_out)
    loss = sum(record.teacher_loss for record in held_out) / positions if positions else None
    return {
        "documents": plan.documents,
        "tokens": plan.tokens,
        "passages": plan.passages,
        "content": plan.content,
        "portions": len(plan.portions),
        "teacher": root.sources[name].get("teacher_name", root.provenance.get("teacher", "")),
        "rows": {split: plan.rows(split) for split in SPLITS},
        "padding": plan.padding / max(1, sum(map(plan.rows, SPLITS)) * (cache.spec.seq_len + 1)),
        "lost": plan.lost / plan.tokens,
        "committed_rows": {split: cache.committed_rows(name, split) for split in SPLITS},
        "teacher_loss": loss,
        "teacher_perplexity": None if loss is None else _exp(loss),
        "seen": total(record.audit for split in SPLITS for record in records[split]),
    }


def _exp(loss: float) -> float:
    """Return e^loss, or the largest float where it is beyond."""
    return math.exp(min(loss, 709.0))


def printable(text: str) -> str:
    """Return text of people and caches without what a terminal would obey: escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(facts: Facts) -> None:
    """Print the facts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    spec, console = facts["spec"], Console(width=WIDE)
    columns = shutil.get_terminal_size((WIDE, 24)).columns

    def line(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style))

    line(f"{facts['path']}  fingerprint {facts['fingerprint']}", "bold")
    teacher, dtype = facts["provenance"].get("teacher"), spec["teacher"].get("dtype", "callable")
    line(
        f"{spec['targets']} of {spec['vocab_size']:,} tokens, rows of {spec['seq_len']:,}; "
        f"teacher {teacher} ({dtype})"
    )
    for name, identity in facts["domain_teachers"].items():
        dtype = identity.get("dtype", "callable")
        line(f"teacher of {name}: {facts['domains'][name]['teacher']} ({dtype})")
    packed = [(PACKED, _packed)] if spec.get("packing") == "documents" else []
    for names, figures in ((HELD, _held), *packed, (SEEN, _seen)):
        table = Table("domain", box=None, pad_edge=False)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for name, domain in facts["domains"].items():
            table.add_row(Text(name), *figures(domain))
        if console.measure(table).maximum <= columns:
            console.print(table, "")
            continue
        for name, domain in facts["domains"].items():
            line(name, "bold")
            for label, figure in zip(names, figures(domain), strict=True):
                line(f"  {' '.join(label.split())}: {figure}")
    if facts["unplanned"]:
        line(f"not planned yet: {', '.join(facts['unplanned'])}")
    parts = ", ".join(f"{name} {size:.2f}" for name, size in facts["bytes_per_token"].items())
    line(f"{facts['tokens']:,} tokens, {facts['bytes']:,} bytes; bytes per token: {parts}")
    for name, domain in facts["domains"].items():
        if domain["passages"]:
            line(passages_note(name, spec["seq_len"]))
    for warning in facts["warnings"]:
        line(f"warning: {warning}")


def _held(domain: DomainFacts) -> Sequence[str]:
    """Return the figures of `HELD`."""
    planned, done = (sum(rows.values()) for rows in (domain["rows"], domain["committed_rows"]))
    perplexity = domain["teacher_perplexity"]
    return [
        f"{domain['documents']:,}",
        f"{domain['rows'][TRAIN]:,}",
        f"{domain['rows'][VALIDATION]:,}",
        f"{done / planned:.0%}" if planned else "–",
        "–" if perplexity is None else f"{perplexity:,.2f}",
    ]


def _packed(domain: DomainFacts) -> Sequence[str]:
    """Return the figures of `PACKED`."""
    return [f"{domain['padding']:.1%}", f"{domain['lost']:.1%}"]


def _seen(domain: DomainFacts) -> Sequence[str]:
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
