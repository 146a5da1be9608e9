"""Documents → rows of tokens: tokenized, split by content, and packed.

Which split a document belongs to follows from its content alone, so a document is never in both,
and documents added later move nothing; long documents of a domain that has few are divided, see
`ddk_cache.corpus.passages`. How documents become rows is in `ddk_cache.corpus.packing`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from ddk_cache.corpus import passages
from ddk_cache.corpus.chat import encode_chat
from ddk_cache.corpus.document import Document
from ddk_cache.corpus.packing import DocumentPacker, Packer, StreamPacker
from ddk_cache.corpus.passages import Divider
from ddk_cache.corpus.sources import Source, documents
from ddk_cache.corpus.spans import Encoded
from ddk_cache.errors import InputError, MismatchError
from ddk_cache.format.spec import CacheSpec
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
    return canonical(document.identity)


def split_of(data: bytes, holdout: float) -> str:
    """Return the split of a document from its bytes: a share `holdout` is for validation."""
    held_out = xxhash.xxh3_64_intdigest(data) < int(holdout * 2**64)
    return SPLITS[held_out]


# --- tokens ---------------------------------------------------------------------------------------


def encode(
    tokenizer: Any, batch: Sequence[Document], first: int = 1, learn: str = "assistant"
) -> list[list[Encoded]]:
    """Tokenize documents, each as one or several samples closed by the end-of-text token.

    A text is one sample, of which all is counted, and a control token that stands in it is
    tokenized as the text that it is there. Of the others `learn` says what is counted, and a
    conversation may be several samples; see `encode_chat`. `first` is the number of the first
    document, for messages.

    Raises:
        InputError: as `encode_chat`; the message names the conversation.
    """
    texts = [document for document in batch if isinstance(document, str)]
    ids = iter(_encode_texts(tokenizer, texts) if texts else [])
    eos = tokenizer.eos_token_id
    encoded: list[list[Encoded]] = []
    for number, document in enumerate(batch, first):
        if isinstance(document, str):
            tokens = [*next(ids), eos]
            encoded.append([(tokens, [True] * len(tokens))])
            continue
        try:
            encoded.append(encode_chat(tokenizer, document, learn))
        except InputError as error:
            raise InputError(f"conversation {number:,}: {error}") from error
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
class Tally:
    """What has been read of a domain so far."""

    documents: int = 0
    tokens: int = 0
    content: Any = field(default_factory=xxhash.xxh3_128)
    padding: int = 0
    """Tokens of padding in the rows."""
    lost: int = 0
    """Tokens that are in no row, of documents longer than one."""
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
    spec: CacheSpec,
    *,
    block: int,
    tally: Tally,
    span: Span = Span(),
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Yield a split and n of its rows: `tokens` (n, S+1), `loss_mask` (n, S) and, where documents
    are kept apart, `segments` (n, S+1). n is `block`, less in a split's last.

    `tally` is brought up to date as documents are read. A domain that ends without held-out
    positions is logged as a warning, before a teacher is run.

    Raises:
        InputError: as `documents` and `encode`, or the domain is too short for one training row,
            or no token of its training rows counts.
        MismatchError: the documents before the span differ from those it was planned with.
    """  # noqa: D205
    seq_len = spec.seq_len
    rows, counted = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    divider = Divider(seq_len, spec.holdout, span.passages)
    stream = divider.pieces(_encoded(source, tokenizer, spec, tally, span))
    packers: dict[str, Packer] = {
        split: DocumentPacker(seq_len, spec.too_long, tokenizer.eos_token_id)
        if spec.packing == "documents"
        else StreamPacker(seq_len)
        for split in SPLITS
    }
    for split, arrays in _blocks(stream, packers, block):
        rows[split] += len(arrays["tokens"])
        counted[split] += int(arrays["loss_mask"].sum())
        if "segments" in arrays:
            tally.padding += int((arrays["segments"] == 0).sum())
        yield split, arrays
    tally.lost = sum(packer.lost for packer in packers.values())
    tally.passages = bool(divider.passages)
    if not span.skip:
        check_enough(source, spec, tally, rows, counted)


def check_enough(
    source: Source,
    spec: CacheSpec,
    tally: Tally,
    rows: Mapping[str, int],
    counted: Mapping[str, int],
) -> None:
    """Check that a domain has what to train on, and warn where it has nothing held out.

    `rows` and `counted` are its rows, and their positions that count, by split.

    Raises:
        InputError: it is too short for one training row, or no token of its training rows counts.
    """
    where = f"domain {source.name!r} ({source.place})"
    if not rows["train"]:
        raise InputError(
            f"{where} is too short: {tally.tokens:,} tokens in {tally.documents:,} documents do "
            f"not fill one training row of {spec.seq_len + 1}."
            if spec.packing == "stream"
            else f"{where} has no training row: of {tally.tokens:,} tokens in "
            f"{tally.documents:,} documents, {tally.lost:,} are of documents longer than "
            f"{spec.seq_len + 1} tokens, and the others are held out. Raise --seq-len, or give "
            "--too-long split."
        )
    if not counted["train"]:
        raise InputError(
            f"{where} has no assistant tokens in its {rows['train']:,} training rows, so there is "
            "nothing to learn from it. Leave the domain out."
        )
    if spec.holdout and not counted["validation"]:
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
    stream: Iterable[tuple[str, Encoded]], packers: Mapping[str, Packer], block: int
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Pack the documents of each split into blocks of rows; the last of a split may be short."""
    for split, encoded in stream:
        packers[split].add(encoded)
        while packers[split].rows >= block:
            yield split, packers[split].take(block)
    for split, packer in packers.items():
        packer.finish()
        while packer.rows:
            yield split, packer.take(min(block, packer.rows))


def _encoded(
    source: Source, tokenizer: Any, spec: CacheSpec, tally: Tally, span: Span
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
        numbered = [document for document, _ in batch], tally.documents + 1
        try:
            encoded = encode(tokenizer, *numbered, spec.learn)
        except InputError as error:
            raise InputError(f"domain {source.name!r} ({source.place}): {error}") from error
        for (document, data), samples in zip(batch, encoded, strict=True):
            tally.add(data, 0)
            key, split = xxhash.xxh3_64_intdigest(data), split_of(data, spec.holdout)
            for tokens, counted in samples:
                room = source.tokens - tally.tokens if source.tokens else len(tokens)
                tally.tokens += min(len(tokens), room)
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
