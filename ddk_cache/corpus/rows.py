"""Documents → rows of tokens: tokenized, split by content, joined end to end and cut.

Which split a document belongs to follows from its content alone, so a document is never in both,
and documents added later move nothing; long documents of a domain that has few are divided, see
`ddk_cache.corpus.passages`. Rows are cut without regard to where documents end: no position is
wasted on padding, and a row may hold the end of one document and the beginning of the next.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from ddk_cache.corpus import passages
from ddk_cache.corpus.chat import Encoded, encode_chat
from ddk_cache.corpus.passages import Divider
from ddk_cache.corpus.sources import Document, Source, documents
from ddk_cache.errors import InputError, MismatchError
from ddk_cache.hashing import canonical
from ddk_cache.types import SPLITS, Array

BATCH_DOCUMENTS = 256
"""Documents tokenized in one call, which the tokenizer spreads over the cores, at most."""

BATCH_BYTES = 2**22
"""Bytes of such documents, about; a tokenizer needs up to 260 times as much memory."""

Identified = tuple[Document, bytes]
"""A document and the bytes that identify it."""

log = logging.getLogger(__name__)


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


def encode(tokenizer: Any, batch: Sequence[Document], first: int = 1) -> list[Encoded]:
    """Tokenize documents, each closed by the end-of-text token.

    A control token that stands in a document is tokenized as the text that it is there. In a
    conversation only what the assistant says is counted. `first` is the number of the first
    document, for messages.

    Raises:
        InputError: as `encode_chat`; the message names the conversation.
    """
    texts = [document for document in batch if isinstance(document, str)]
    ids = iter(_encode_texts(tokenizer, texts) if texts else [])
    eos = tokenizer.eos_token_id
    encoded: list[Encoded] = []
    for number, document in enumerate(batch, first):
        if isinstance(document, str):
            tokens = [*next(ids), eos]
            encoded.append((tokens, [True] * len(tokens)))
            continue
        try:
            tokens, counted = encode_chat(tokenizer, document)
        except InputError as error:
            raise InputError(f"conversation {number:,}: {error}") from error
        encoded.append(([*tokens, eos], [*counted, False]))
    return encoded


def _encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    out = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    return list(out["input_ids"])


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
    """What has been read of a domain so far."""

    documents: int = 0
    tokens: int = 0
    content: Any = field(default_factory=xxhash.xxh3_128)
    passages: bool = False
    """Its long documents are cut into passages."""

    def add(self, data: bytes, tokens: int) -> None:
        """Count a document; the length keeps two documents apart from one that joins them."""
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
    """Hash that the skipped documents must have."""
    tokens: int = 0
    """Tokens of the skipped documents."""
    passages: bool | None = None
    """What the plan says of passages; None where the documents are to decide."""


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

    `tally` is brought up to date as documents are read. A domain that ends without held-out
    positions is logged as a warning, before a teacher is run.

    Raises:
        InputError: as `documents` and `encode`, or the domain is too short for one training row,
            or no token of its training rows counts.
        MismatchError: the documents before the span differ from those it was planned with.
    """
    rows, counted = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    divider = Divider(seq_len, holdout, span.passages)
    stream = divider.pieces(_encoded(source, tokenizer, holdout, tally, span))
    for split, tokens, loss_mask in _blocks(stream, seq_len, block):
        rows[split] += len(tokens)
        counted[split] += int(loss_mask.sum())
        yield split, tokens, loss_mask
    tally.passages = bool(divider.passages)
    if span.skip:
        return
    where = f"domain {source.name!r} ({source.place})"
    if not rows["train"]:
        raise InputError(
            f"{where} is too short: {tally.tokens:,} tokens in {tally.documents:,} documents do "
            f"not fill one training row of {seq_len + 1}."
        )
    if not counted["train"]:
        raise InputError(
            f"{where} has no assistant tokens in its {rows['train']:,} training rows, so there is "
            "nothing to learn from it. Leave the domain out."
        )
    if holdout and not counted["validation"]:
        advice = (
            "Raise --holdout, lower --seq-len or add documents."
            if tally.documents > 1
            else "It is one document, which is in one split. Divide it into several."
        )
        log.warning(
            "%s has no held-out rows; its gap will be that of training rows when they are first "
            "drawn. %s",
            where,
            advice,
        )


def _blocks(
    stream: Iterable[tuple[str, Encoded]], seq_len: int, block: int
) -> Iterator[tuple[str, Array, Array]]:
    """Pack the documents of each split into blocks of rows; the last of a split may be short."""
    packers = {split: Packer(seq_len) for split in SPLITS}
    for split, encoded in stream:
        packers[split].add(encoded)
        while packers[split].rows >= block:
            yield split, *packers[split].take(block)
    for split, packer in packers.items():
        if packer.rows:
            yield split, *packer.take(packer.rows)


def _encoded(
    source: Source, tokenizer: Any, holdout: float, tally: Tally, span: Span
) -> Iterator[passages.Document]:
    reading: Iterator[Identified]
    reading = ((document, content(document)) for document in documents(source))
    for _, data in itertools.islice(reading, span.skip):
        tally.add(data, 0)
    tally.tokens = span.tokens
    if span.skip and tally.content.hexdigest() != span.content:
        raise MismatchError(
            f"domain {source.name!r} ({source.place}): its first {span.skip:,} documents differ "
            "from those that the cache was built from. A domain grows at its end only."
        )
    if source.tokens and tally.tokens >= source.tokens:
        return
    if span.stop is not None:
        reading = itertools.islice(reading, span.stop - span.skip)
    for batch in _batches(reading):
        try:
            encoded = encode(tokenizer, [document for document, _ in batch], tally.documents + 1)
        except InputError as error:
            raise InputError(f"domain {source.name!r} ({source.place}): {error}") from error
        for (document, data), (tokens, counted) in zip(batch, encoded, strict=True):
            room = source.tokens - tally.tokens if source.tokens else len(tokens)
            tally.add(data, min(len(tokens), room))
            key, split = xxhash.xxh3_64_intdigest(data), split_of(data, holdout)
            cut = tokens[:room], counted[:room]
            yield passages.Document(key, split, isinstance(document, str), cut)
            if source.tokens and tally.tokens >= source.tokens:
                return


def _batches(items: Iterable[Identified]) -> Iterator[list[Identified]]:
    """Group documents and their bytes; only the last document of a group may exceed the bytes."""
    batch: list[Identified] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item[1])
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
