"""Documents → pieces that belong to one split each: whole documents, or passages of long ones.

A document belongs to a split by its content alone, so it is never in both, and documents added
later move nothing. In a domain of a few long documents that leaves no row held out, or a third of
all rows. The first documents of a domain show this; its plan then records that its long documents
are cut into passages of one row, and a share of the passages of each is held out. The price is
that both splits have parts of one document, kept apart by a gap of a quarter of a row.

S is the length of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ddk_cache.corpus.spans import Encoded
from ddk_cache.rng import key_of
from ddk_cache.types import TRAIN, VALIDATION, Array

LONG = 4
"""Rows from which a text is long."""

LOOK_AHEAD = 20
"""Held-out documents to expect among those that decide whether a domain needs passages."""

MOST_TOKENS = 2**25
"""Tokens of those documents, at most; they wait in memory, at 5 bytes each."""

Piece = tuple[str, Encoded]
"""A split, and consecutive tokens of a document that belong to it."""


def passages_note(domain: str, seq_len: int) -> str:
    """Return the sentence about a domain that is cut, for `estimate` and `info`."""
    return (
        f"{domain}: whole documents cannot meet the held-out share; long ones are cut into "
        f"passages of {seq_len:,} tokens, of which a share is held out."
    )


class Document(NamedTuple):
    """A tokenized document."""

    key: int
    """A hash of its content."""
    split: str
    """The split that it belongs to as a whole."""
    text: bool
    """It is a text; a conversation is never cut."""
    encoded: Encoded


class Waiting(NamedTuple):
    """A document that waits for a decision, in little memory."""

    document: Document
    """Without its tokens."""
    tokens: Array
    counted: Array

    def release(self) -> Document:
        """Return the document as it came."""
        return self.document._replace(encoded=(self.tokens.tolist(), self.counted.tolist()))


@dataclass
class Divider:
    """The documents of a domain, divided between the splits."""

    seq_len: int
    holdout: float
    passages: bool | None = None
    """Cut long texts. None leaves that to the first documents; it is known once they are read."""

    def pieces(self, documents: Iterable[Document]) -> Iterator[Piece]:
        """Yield the pieces of documents, in order."""
        documents = iter(documents)
        if not self.holdout:
            self.passages = False
        if self.passages is None:
            first = list(self._first(documents))
            self.passages = self._needed(first)
            documents = itertools.chain((waiting.release() for waiting in first), documents)
        for document in documents:
            yield from self._cut(document) if self._is_cut(document) else [document[1::2]]

    def _first(self, documents: Iterator[Document]) -> Iterator[Waiting]:
        """Yield the documents that decide: enough for the law of large numbers, or all."""
        tokens = 0
        for number, document in enumerate(documents, 1):
            ids, counted = document.encoded
            tokens += len(ids)
            shell = document._replace(encoded=([], []))
            yield Waiting(shell, np.array(ids, np.int32), np.array(counted, bool))
            if number * self.holdout >= LOOK_AHEAD or tokens >= MOST_TOKENS:
                return

    def _needed(self, first: Sequence[Waiting]) -> bool:
        """Return whether whole documents miss the share by a factor of two, and some can be cut."""
        sizes = np.array([len(waiting.tokens) for waiting in first])
        held_out = np.array([waiting.document.split == VALIDATION for waiting in first], bool)
        texts = np.array([waiting.document.text for waiting in first], bool)
        share = sizes[held_out].sum() / max(1, sizes.sum())
        meets = self.holdout / 2 <= share <= 2 * self.holdout
        return not meets and bool((sizes[texts] >= LONG * self.seq_len).any())

    def _is_cut(self, document: Document) -> bool:
        long = len(document.encoded[0]) >= LONG * self.seq_len
        return bool(self.passages) and document.text and long

    def _cut(self, document: Document) -> Iterator[Piece]:
        """Yield the parts of a long text. The first token of a part has no context to follow."""
        tokens, counted = document.encoded
        for split, start, stop in parts(document.key, len(tokens), self.seq_len, self.holdout):
            flags = counted[start:stop]
            yield split, (tokens[start:stop], [start == 0 and flags[0], *flags[1:]])


def parts(key: int, tokens: int, seq_len: int, holdout: float) -> Iterator[tuple[str, int, int]]:
    """Yield (split, first token, one past the last) of the parts of a document, in order.

    A training part loses S // 4 tokens at each end that borders on a held-out part.
    """
    gap, begin = seq_len // 4, 0
    passages = tokens // seq_len
    for first, last in runs(held_out(key, passages, holdout)):
        start, stop = first * seq_len, tokens if last == passages else last * seq_len
        if begin < start - gap:
            yield TRAIN, begin, start - gap
        yield VALIDATION, start, stop
        begin = stop + gap
    if begin < tokens:
        yield TRAIN, begin, tokens


def held_out(key: int, passages: int, holdout: float) -> list[int]:
    """Return which passages of a document are held out: a share, spread evenly, by its content.

    The number is the share rounded up or down, up with the probability that the share asks for.
    """
    whole, rest = divmod(passages * holdout, 1)
    count = min(int(whole) + (key_of(key, "count") < int(rest * 2**64)), passages - 1)
    borders = [number * passages // count for number in range(count + 1)] if count else [0]
    return [low + key_of(key, low) % (high - low) for low, high in itertools.pairwise(borders)]


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, one past the last) of each run of consecutive numbers."""
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield found[0], found[-1] + 1
