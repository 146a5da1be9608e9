"""Pairs: a response of the teacher and one of the initial student to the same prompt, scored.

The pairs of a cache are a cache below it, CACHE/pairs, in which each pair is two rows: 2n holds the
prompt and the teacher's response, 2n + 1 the prompt and the student's, and only the response is
counted. What the teacher thinks of each token is `label_logprob`, as in every cache. So pairs are
planned, scored, committed, checked and read by the code that does so for rows. The price is
padding: a row is as long as the longest pair.

A log-probability is stored in steps of 2⁻¹⁰ nats: its mean over a response is off by half a step at
most.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ddk_cache.build.config import CHUNK_TOKENS, SHARD_TOKENS, BuildConfig
from ddk_cache.build.create import GROW, compare
from ddk_cache.build.job import build_cache
from ddk_cache.build.teacher import Teacher
from ddk_cache.corpus.rows import Span, Tally, split_of
from ddk_cache.corpus.sources import Source
from ddk_cache.errors import InputError, MismatchError
from ddk_cache.format.layout import pairs_of
from ddk_cache.format.spec import CacheSpec
from ddk_cache.hashing import canonical, digest
from ddk_cache.hf import identify_tokenizer
from ddk_cache.read.cache import Cache
from ddk_cache.sequences.config import SamplingConfig
from ddk_cache.sequences.decode import Responder
from ddk_cache.sequences.generate import answer
from ddk_cache.sequences.prompts import (
    Prompt,
    encoded,
    plain_ids,
    read_answered,
    written_with,
)
from ddk_cache.types import SPLITS, Array

log = logging.getLogger(__name__)

ROUND = 16
"""The length of a row is a multiple of this, so that a few more prompts change nothing else."""


@dataclass(frozen=True)
class Pair:
    """A prompt and two responses, as tokens."""

    prompt: Sequence[int]
    responses: tuple[tuple[int, ...], tuple[int, ...]]
    """The teacher's and the student's."""
    content: bytes
    """What decides its split: the document of the prompt with the teacher's response."""

    @property
    def longest(self) -> int:
        """Return the tokens of the prompt with the longer response."""
        return len(self.prompt) + max(map(len, self.responses))


@dataclass(frozen=True, kw_only=True)
class PairSource(Source):
    """Where the pairs of a domain come from."""

    student: str
    """Identifies the student and how it answered."""

    def describe(self) -> dict[str, Any]:
        """Return what a resumed job compares."""
        return super().describe() | {"student": self.student}


@dataclass(frozen=True)
class PairRows:
    """What makes rows of pairs, in place of `ddk_cache.corpus.rows.token_rows`."""

    pairs: Mapping[str, Sequence[Pair]]

    def __call__(
        self,
        source: Source,
        tokenizer: Any,
        spec: CacheSpec,
        *,
        block: int,
        tally: Tally,
        span: Span,
    ) -> Iterator[tuple[str, dict[str, Array]]]:
        """Yield a split with tokens (n, S+1) and loss mask (n, S), two rows for each pair."""
        fill = tokenizer.eos_token_id
        waiting: dict[str, list[tuple[Array, Array]]] = {split: [] for split in SPLITS}
        for pair in self.pairs[source.name]:
            split = split_of(pair.content, spec.holdout)
            made = [padded(pair.prompt, ids, spec.seq_len, fill) for ids in pair.responses]
            waiting[split] += made
            data = b"".join(tokens.tobytes() for tokens, _ in made)
            tally.add(data, sum(int(mask.sum()) for _, mask in made))
            if len(waiting[split]) == block:
                yield split, stacked(waiting[split])
                waiting[split] = []
        for split, rows in waiting.items():
            if rows:
                yield split, stacked(rows)


def padded(
    prompt: Sequence[int], response: Sequence[int], seq_len: int, fill: int
) -> tuple[Array, Array]:
    """Return the row of a prompt and a response: tokens (S+1) int64, loss mask (S) bool."""
    tokens, mask = np.full(seq_len + 1, fill, np.int64), np.zeros(seq_len, bool)
    end = len(prompt) + len(response)
    tokens[:end] = [*prompt, *response]
    mask[len(prompt) - 1 : end - 1] = True  # position s predicts token s + 1
    return tokens, mask


def stacked(rows: Sequence[tuple[Array, Array]]) -> dict[str, Array]:
    """Return tokens (n, S+1) and masks (n, S) of n rows."""
    tokens, masks = zip(*rows, strict=True)
    return {"tokens": np.stack(tokens), "loss_mask": np.stack(masks)}


def answer_prompts(
    cache: Cache,
    sources: Sequence[Source],
    student: Responder,
    answers: str | Path,
    config: SamplingConfig = SamplingConfig(),  # noqa: B008 (it is frozen)
    *,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Let the initial student answer each prompt once, in a directory as `generate` writes it.

    Raises:
        InputError: a prompt has no response, a domain is not one of the cache, or as `generate`.
        MismatchError: the tokenizer is not that of the cache, or the job was begun otherwise.
    """
    check_tokenizer(cache, student.tokenizer)
    check_domains(cache, sources)
    prompts = {source.name: list(read_answered(source)) for source in sources}
    answer(Path(answers), prompts, sources, student, config, rank, world)


def build_pairs(
    cache: Cache,
    sources: Sequence[Source],
    answers: str | Path,
    teacher: Teacher,
    tokenizer: Any,
    *,
    batch_rows: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Store the pairs of a cache, or resume a job that was stopped.

    Pairs of equal responses, and those longer than the rows of the cache, are left out; their
    number is logged.

    Args:
        cache: The cache, whose teacher and tokenizer are used.
        sources: Prompts with the teacher's responses, as `find_sources` gives them.
        answers: The directory that `answer_prompts` wrote for the same prompts.
        teacher: The teacher of the cache.
        tokenizer: Its tokenizer.
        batch_rows: Rows in one call to the teacher; by default as many as fit in memory.
        rank: Which process this is, of `world`.
        world: The number of processes that were given the same call.

    Raises:
        InputError: no pair of a domain is left, or a response is missing.
        MismatchError: teacher or tokenizer are not those of the cache, or the pairs were begun
            with other settings.
    """
    check_tokenizer(cache, tokenizer)
    check_domains(cache, sources)
    compare(cache.uri, cache.spec.teacher, teacher.identity)
    most, pairs, known = cache.spec.seq_len, {}, []
    for source in sources:
        pairs[source.name] = read_pairs(source, Path(answers), tokenizer, most)
        student = digest(canonical(read_answers(Path(answers) / source.name)[0]))
        known.append(PairSource(**vars(source), student=student))
    longest = max(pair.longest for found in pairs.values() for pair in found)
    seq_len = min(most, -(-(longest - 1) // ROUND) * ROUND)
    chunk_rows = 2 * max(1, CHUNK_TOKENS // seq_len // 2)  # both rows of a pair in one chunk
    config = BuildConfig(
        seq_len=seq_len,
        packing="stream",
        targets="topk:1",
        compression=cache.spec.compression,
        holdout=cache.spec.holdout,
        chunk_rows=chunk_rows,
        shard_rows=chunk_rows * max(1, SHARD_TOKENS // seq_len // chunk_rows),
        batch_rows=batch_rows,
    )
    place = pairs_of(cache.uri)
    try:
        build_cache(
            place, known, teacher, tokenizer, config, rank=rank, world=world, read=PairRows(pairs)
        )
    except MismatchError as error:
        text = str(error).removesuffix(GROW)
        raise MismatchError(f"{text} Or remove {place} to make the pairs anew.") from error


def check_tokenizer(cache: Cache, tokenizer: Any) -> None:
    """Raise MismatchError unless a tokenizer gives ids the strings that the cache's gives them."""
    was, now = cache.spec.tokenizer, identify_tokenizer(tokenizer)
    compare(cache.uri, {"tokenizer": was["vocabulary"]}, {"tokenizer": now["vocabulary"]})


def check_domains(cache: Cache, sources: Sequence[Source]) -> None:
    """Raise InputError where prompts are of a domain that the cache does not have."""
    if others := sorted({source.name for source in sources} - set(cache.domains)):
        raise InputError(
            f"prompts of {', '.join(others)}: {cache.uri} has no such domain; it has "
            f"{', '.join(cache.domains)}. Build the domain first, or rename it in a mix file."
        )


def read_pairs(source: Source, answers: Path, tokenizer: Any, most: int) -> list[Pair]:
    """Return the pairs of a domain of at most `most` + 1 tokens whose responses differ.

    Raises:
        InputError: none is left, or a response is missing.
    """
    ours = identify_tokenizer(tokenizer)["vocabulary"]
    theirs_of = [written_with(Path(file)).get("tokenizer", {}) for file in source.files[:1]]
    exact = any(known.get("vocabulary") == ours for known in theirs_of)

    def ids_of(prompt: Prompt) -> tuple[list[int], tuple[int, ...]]:
        asked = prompt.encode(tokenizer)
        if exact and prompt.response_ids:
            return asked, prompt.response_ids
        return asked, (*plain_ids(tokenizer, prompt.response), tokenizer.eos_token_id)

    prompts, said = list(read_answered(source)), read_answers(answers / source.name)[1]
    found, equal, long = [], 0, 0
    for number, (asked, theirs) in enumerate(encoded(source, prompts, ids_of)):
        if number not in said:
            raise InputError(
                f"{answers}: there is no answer to prompt {number + 1:,} of {source.name!r}. Run "
                "'ddk-cache pair' again, with another --answers if the prompts have changed."
            )
        pair = Pair(asked, (theirs, said[number]), prompts[number].content)
        if theirs == said[number]:
            equal += 1
        elif pair.longest > most + 1:
            long += 1
        else:
            found.append(pair)
    counts = f"{equal:,} with equal responses, {long:,} longer than {most + 1:,} tokens"
    if not found:
        raise InputError(
            f"domain {source.name!r}: no pair is left of {len(prompts):,}: {counts}. Give other "
            "prompts, or a --temperature above 0."
        )
    log.info(f"{source.name}: {len(found):,} pairs; left out: {counts}")
    return found


def read_answers(folder: Path) -> tuple[dict[str, Any], dict[int, tuple[int, ...]]]:
    """Return what the answers of a domain were written with, and the tokens of each, by number."""
    settings, found = {}, {}
    for file in sorted(folder.glob("*.parquet")):
        settings = written_with(file)
        with file.open("rb") as opened:
            # Not read_table: its threads may abort a command that ends while they start.
            table = pq.ParquetFile(opened).read(["number", "response_ids"], use_threads=False)
        for row in table.to_pylist():
            found[row["number"]] = tuple(row["response_ids"])
    return settings, found
