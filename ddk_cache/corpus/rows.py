"""Documents → rows of tokens: tokenised, split by content, joined end to end and cut.

Which split a document belongs to follows from its content alone, so a document never stands in
both, and documents added later move nothing. Rows are cut without regard to where documents end:
no position is wasted on padding, and a row may hold the end of one document and the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from ddk_cache.corpus.chat import Encoded, encode_chat
from ddk_cache.corpus.sources import Document, Source, documents
from ddk_cache.errors import InputError, MismatchError
from ddk_cache.hashing import canonical
from ddk_cache.types import SPLITS, Array

DOCUMENTS_AT_ONCE = 256
"""Documents tokenised in one call, which the tokenizer spreads over the cores."""


def content(document: Document) -> bytes:
    """Return the bytes that identify a document."""
    if isinstance(document, str):
        return document.encode("utf-8", "surrogatepass")
    return canonical(document)


def split_of(data: bytes, holdout: float) -> str:
    """Return the split of a document from its bytes: a share `holdout` is for validation."""
    held_out = xxhash.xxh3_64_intdigest(data) < int(holdout * 2**64)
    return SPLITS[held_out]


# --- tokens ---------------------------------------------------------------------------------------


def encode(tokenizer: Any, batch: list[Document]) -> list[Encoded]:
    """Tokenise documents, each closed by the end-of-text token.

    In a conversation only what the assistant says is counted.
    """
    texts = [document for document in batch if isinstance(document, str)]
    plain = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    ids = iter(plain)
    eos = tokenizer.eos_token_id
    encoded: list[Encoded] = []
    for document in batch:
        if isinstance(document, str):
            tokens = [*next(ids), eos]
            encoded.append((tokens, [True] * len(tokens)))
        else:
            tokens, spoken = encode_chat(tokenizer, document)
            encoded.append(([*tokens, eos], [*spoken, False]))
    return encoded


# --- rows -----------------------------------------------------------------------------------------


@dataclass
class Packer:
    """Documents joined end to end and cut into rows of S+1 tokens.

    Neighbouring rows share one token (the last of a row opens the next), so that every token
    but the very first is predicted exactly once.
    """

    seq_len: int
    tokens: list[int] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)

    def add(self, encoded: Encoded) -> None:
        """Append a document."""
        self.tokens += encoded[0]
        self.counted += encoded[1]

    @property
    def rows(self) -> int:
        """Return the number of whole rows at hand."""
        return max(0, (len(self.tokens) - 1) // self.seq_len)

    def take(self, rows: int) -> tuple[Array, Array]:
        """Remove and return tokens (rows, S+1) int64 and loss mask (rows, S) bool."""
        used = rows * self.seq_len
        at = np.arange(rows)[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        tokens = np.asarray(self.tokens[: used + 1], np.int64)[at]
        counted = np.asarray(self.counted[: used + 1], bool)[at[:, 1:]]
        del self.tokens[:used], self.counted[:used]
        return tokens, counted


@dataclass
class Tally:
    """What was read of a domain so far."""

    documents: int = 0
    tokens: int = 0
    content: Any = field(default_factory=xxhash.xxh3_128)

    def add(self, data: bytes, tokens: int) -> None:
        """Count a document; the length before the bytes keeps two documents from reading as one."""
        self.documents += 1
        self.tokens += tokens
        self.content.update(len(data).to_bytes(8, "little") + data)


@dataclass(frozen=True)
class Span:
    """A run of a source's documents."""

    skip: int = 0
    """Documents before it."""
    stop: int | None = None
    """Number of the document that it ends before; None is the end of the source."""
    content: str = ""
    """Hash that the skipped documents have to have."""
    tokens: int = 0
    """Tokens of the skipped documents."""


def token_rows(
    source: Source,
    tokenizer: Any,
    *,
    seq_len: int,
    holdout: float,
    block: int,
    tally: Tally,
    span: Span = Span(),
) -> Iterator[tuple[str, Array, Array]]:
    """Yield (split, tokens (n, S+1), loss mask (n, S)): n = `block`, less in a split's last.

    `tally` is brought up to date as documents are read.

    Raises:
        InputError: as `documents` and `encode`, or the domain is too short for one training row.
        MismatchError: the documents before the span are others than it says.
    """
    packers = {split: Packer(seq_len) for split in SPLITS}
    taken = dict.fromkeys(SPLITS, 0)
    for split, encoded in _encoded(source, tokenizer, holdout, tally, span):
        packers[split].add(encoded)
        while packers[split].rows >= block:
            taken[split] += block
            yield split, *packers[split].take(block)
    for split, packer in packers.items():
        if rows := packer.rows:
            taken[split] += rows
            yield split, *packer.take(rows)
    if not taken["train"] and not span.skip:
        raise InputError(
            f"domain {source.name!r} ({source.place}) is too short: {tally.tokens:,} tokens in "
            f"{tally.documents:,} documents do not fill one training row of {seq_len + 1}."
        )


def _encoded(
    source: Source, tokenizer: Any, holdout: float, tally: Tally, span: Span
) -> Iterator[tuple[str, Encoded]]:
    reading = documents(source)
    for document in itertools.islice(reading, span.skip):
        tally.add(content(document), 0)
    tally.tokens = span.tokens
    if span.skip and tally.content.hexdigest() != span.content:
        raise MismatchError(
            f"domain {source.name!r} ({source.place}): its first {span.skip:,} documents are not "
            "those that the cache was built from. A domain grows at its end only."
        )
    if source.tokens and tally.tokens >= source.tokens:
        return
    if span.stop is not None:
        reading = itertools.islice(reading, span.stop - span.skip)
    for batch in _batches(reading, DOCUMENTS_AT_ONCE):
        try:
            encoded = encode(tokenizer, batch)
        except InputError as error:
            raise InputError(f"domain {source.name!r} ({source.place}): {error}") from error
        for document, tokens in zip(batch, encoded, strict=True):
            data = content(document)
            tally.add(data, len(tokens[0]))
            yield split_of(data, holdout), tokens
            if source.tokens and tally.tokens >= source.tokens:
                return


def _batches(items: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
