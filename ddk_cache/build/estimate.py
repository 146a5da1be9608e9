"""What a cache will cost, before it is paid for: rows, bytes, hours, and the bytes/s of a reader.

Counting means tokenizing the whole corpus, which is exact and takes minutes where the teacher
takes days. Bytes and hours are measured on a probe of real rows when there is a teacher; without
one the bytes are those of the arrays before compression, an upper bound, and no hours are given.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddk_cache.build.audit import audit
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.create import make_spec, settled, try_teacher
from ddk_cache.build.scoring import Scorer
from ddk_cache.build.teacher import Teacher
from ddk_cache.build.tokenize import FREQUENT
from ddk_cache.build.writer import ShardWriter
from ddk_cache.console import Progress
from ddk_cache.corpus.passages import passages_note
from ddk_cache.corpus.rows import Tally, token_rows
from ddk_cache.corpus.sources import Source, held_by
from ddk_cache.errors import InputError
from ddk_cache.format.codec import TargetCodec
from ddk_cache.format.plan import ShardKey
from ddk_cache.format.spec import CacheSpec
from ddk_cache.hf import identify_tokenizer
from ddk_cache.storage.local import LocalStorage
from ddk_cache.types import SPLITS, Array

log = logging.getLogger(__name__)


def estimate_cache(
    cache: str,
    sources: Sequence[Source],
    tokenizer: Any,
    teacher: Teacher | None = None,
    config: BuildConfig = BuildConfig(),  # noqa: B008 (it is frozen)
    *,
    probe_rows: int = 16,
    student_speed: float = 50_000.0,
) -> dict[str, Any]:
    """Return what a cache will cost as plain JSON values; nothing is written.

    `cache` is where it would be, `probe_rows` the rows to run through the teacher, and
    `student_speed` the tokens/s of a student that will read the cache.

    Raises:
        InputError: a source cannot be read or is too short, or a setting is out of range.
        CacheError: the teacher failed, or gave something that is not a distribution.
    """
    if not 0 <= student_speed < math.inf:
        raise InputError(f"student_speed: got {student_speed}, expected tokens/s of 0 or more.")
    config = settled(config, sources)
    if others := ", ".join(source.name for source in sources if source.teacher):
        log.warning("%s: the hours are those of --teacher, not of their own teachers", others)
    if teacher:
        spec = make_spec(config, teacher, tokenizer)
        scorer = Scorer(teacher, spec, try_teacher(teacher, spec, config.batch_rows))
    else:
        spec = config.spec(len(tokenizer), {}, identify_tokenizer(tokenizer))
    with Progress("counting", 0, "tokens") as progress:
        counted = count(
            sources,
            tokenizer,
            spec,
            probe_rows=probe_rows,
            advance=progress.advance,
        )
    probed = probe(scorer, counted.sample) if teacher else None
    return facts_of(spec, counted, probed, cache, student_speed)


@dataclass(frozen=True)
class Counted:
    """What a corpus holds."""

    domains: dict[str, dict[str, Any]]
    """What documents they are, how many, tokens, rows by split, and whether long documents are cut
    into passages; shares of padding and of tokens left out."""
    sample: dict[str, Array]
    """The token arrays (N, …) of a few rows of every domain."""

    @property
    def rows(self) -> int:
        """Return the rows of all domains and splits."""
        return sum(sum(domain["rows"].values()) for domain in self.domains.values())


def count(
    sources: Sequence[Source],
    tokenizer: Any,
    spec: CacheSpec,
    *,
    probe_rows: int,
    advance: Callable[[int, str], None],
) -> Counted:
    """Read the whole corpus and count it; keep `probe_rows` rows, spread over the domains.

    Raises:
        InputError: a source cannot be read or is too short.
    """
    domains: dict[str, dict[str, Any]] = {}
    sample: list[dict[str, Array]] = []
    each = -(-probe_rows // len(sources))
    for source in sources:
        tally, rows = Tally(), dict.fromkeys(SPLITS, 0)
        kept: list[dict[str, Array]] = []
        blocks = token_rows(source, tokenizer, spec, block=256, tally=tally)
        for split, arrays in blocks:
            rows[split] += len(arrays["tokens"])
            kept = kept or [{name: array[:each] for name, array in arrays.items()}]
            advance(arrays["tokens"][:, 1:].size, source.name)
        domains[source.name] = {
            "holds": held_by(source),
            "documents": tally.documents,
            "tokens": tally.tokens,
            "passages": tally.passages,
            "rows": rows,
            "padding": tally.padding / max(1, sum(rows.values()) * (spec.seq_len + 1)),
            "lost": tally.lost / max(1, tally.tokens),
        }
        sample += kept
    joined = {
        name: np.concatenate([part[name] for part in sample])[:probe_rows]
        for name in spec.token_arrays
    }
    return Counted(domains, joined)


def raw_bytes(spec: CacheSpec) -> dict[str, float]:
    """Return the bytes per token of every array before compression."""
    return {
        name: layout.dtype.itemsize * int(np.prod(layout.inner)) / spec.seq_len
        for name, layout in spec.arrays.items()
    }


def probe(scorer: Scorer, sample: Mapping[str, Array]) -> dict[str, Any]:
    """Score, audit and store a few rows; return bytes per token by array, and tokens/s.

    Raises:
        CacheError: the teacher failed, or gave something that is not a distribution.
    """
    tokens, segments = sample["tokens"], sample.get("segments")
    spec, key = scorer.spec, ShardKey("probe", "train", 0)
    began = time.perf_counter()
    scores = scorer.score(key, tokens, lambda _: None, segments).arrays
    seconds = time.perf_counter() - began
    chunks = -(-len(tokens) // spec.chunk_rows)
    counts = np.bincount(tokens.ravel(), minlength=spec.vocab_size)
    small = dataclasses.replace(spec, shard_rows=chunks * spec.chunk_rows)
    codec = TargetCodec(spec, np.argsort(-counts, kind="stable")[:FREQUENT].tolist())
    stored = codec.encode(scores, tokens[:, 1:])
    audit("the probe", scores, stored, tokens[:, 1:], codec)
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(LocalStorage(Path(folder)), small)
        objects = writer.write(key, {**stored, **sample})
    positions = len(tokens) * spec.seq_len
    return {
        "bytes_per_token": {name: objects[name].bytes / positions for name in spec.arrays},
        "tokens_per_second": positions / seconds,
    }


def facts_of(
    spec: CacheSpec, counted: Counted, probed: Mapping[str, Any] | None, place: str, speed: float
) -> dict[str, Any]:
    """Return what was counted and measured, and what follows from it, as plain JSON values."""
    per_token = dict(probed["bytes_per_token"]) if probed else raw_bytes(spec)
    size, tokens = sum(per_token.values()), counted.rows * spec.seq_len
    shards = sum(
        -(-rows // spec.shard_rows)
        for domain in counted.domains.values()
        for rows in domain["rows"].values()
    )
    return {
        "spec": spec.to_json(),
        "domains": counted.domains,
        "rows": counted.rows,
        "tokens": tokens,
        "shards": shards,
        "measured": probed is not None,
        "bytes_per_token": per_token | {"all": size},
        "bytes": round(size * tokens),
        "free_bytes": free_bytes(place),
        "tokens_per_second": probed["tokens_per_second"] if probed else None,
        "hours": tokens / probed["tokens_per_second"] / 3600 if probed else None,
        "student_tokens_per_second": speed,
        "read_bytes_per_second": speed * size,
    }


def free_bytes(place: str) -> int | None:
    """Return the free bytes at a path, or above one that is not there yet; None for a URL."""
    if "://" in place:
        return None
    path = Path(place).absolute()
    return shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists())).free


def show(facts: Mapping[str, Any]) -> None:
    """Print an estimate as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, spec = Console(), facts["spec"]
    table = Table("domain", box=None, pad_edge=False)
    for column in ("documents", "tokens", "train rows", "held-out rows"):
        table.add_column(column, justify="right")
    table.add_column("holds")
    for name, domain in facts["domains"].items():
        rows = domain["rows"]
        numbers = (domain["documents"], domain["tokens"], rows["train"], rows["validation"])
        table.add_row(name, *(f"{number:,}" for number in numbers), Text(domain["holds"]))
    console.print(table)
    for name, domain in facts["domains"].items():
        if domain["passages"]:
            console.print(passages_note(name, spec["seq_len"]), highlight=False)
    if spec.get("packing") == "documents":
        for name, domain in facts["domains"].items():
            console.print(
                f"{name}: documents apart, {domain['padding']:.1%} of the rows is padding, "
                f"{domain['lost']:.1%} of the tokens is left out (documents longer than a row)",
                highlight=False,
            )
    size, free = facts["bytes"] / 1e9, facts["free_bytes"]
    bound = "" if facts["measured"] else "at most "
    room = "" if free is None else f"; {free / 1e9:,.2f} GB are free"
    if free is not None and size > free / 1e9:
        room += "  NOT ENOUGH ROOM"
    lines = [
        f"{facts['rows']:,} rows of {spec['seq_len']:,} tokens in {facts['shards']:,} shards",
        f"{bound}{facts['bytes_per_token']['all']:.1f} bytes per token, {bound}{size:,.2f} GB in "
        f"total{room}",
    ]
    if facts["hours"] is not None:
        lines.append(
            f"{facts['hours']:.2f} hours at {facts['tokens_per_second']:,.0f} tokens/s on this "
            "machine, for one process"
        )
    else:
        lines.append("give --teacher to measure bytes and hours")
    lines.append(
        f"a student at {facts['student_tokens_per_second']:,.0f} tokens/s reads "
        f"{facts['read_bytes_per_second'] / 1e6:,.1f} MB/s"
    )
    console.print("\n".join(lines), highlight=False)
