"""Encoded documents → rows of S+1 tokens: one stream that is cut, or documents kept whole.

`stream` fills every position, but a row may begin inside a document and ends inside one. With
`documents`, a document that fits a row is never cut, and each is told from its neighbors in the
row by a number, so that a model can keep them apart; what is left of a row is padding. Documents
wait until there is a choice of them: each row begins with the one that waited longest, and takes
those others that fill it best. So the rows are a function of the documents in order, memory is
bounded by a few rows, and padding is a hundredth or two where documents are shorter than half a
row. Documents of a little more than half a row leave up to half of it empty.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ddk_cache.corpus.spans import Encoded
from ddk_cache.types import Array

WAITING = 64
"""Documents that wait for a row at least, before one is filled: twice as many save nothing."""

WAITING_ROWS = 4
"""Rows that their tokens must fill too, where documents are short."""


class Packer(Protocol):
    """Documents in, rows out."""

    @property
    def rows(self) -> int:
        """Return the number of finished rows at hand."""

    @property
    def lost(self) -> int:
        """Return the tokens of documents that were left out."""

    def add(self, document: Encoded) -> None:
        """Append a document."""

    def finish(self) -> None:
        """Finish the rows that were begun: no document follows."""

    def take(self, rows: int) -> dict[str, Array]:
        """Remove and return finished rows as the token arrays of a cache, by name."""


@dataclass
class StreamPacker:
    """Documents joined end to end and cut into rows of S+1 tokens.

    Neighbouring rows share one token (the last of a row opens the next), so that every token
    but the very first is predicted exactly once. A token takes 5 bytes while it waits; in lists
    it would take about 50.
    """

    seq_len: int
    lost: int = 0
    tokens: array[int] = field(default_factory=lambda: array("i"))
    counted: bytearray = field(default_factory=bytearray)

    def add(self, document: Encoded) -> None:
        """Append a document."""
        self.tokens.fromlist(document[0])
        self.counted += bytes(document[1])

    @property
    def rows(self) -> int:
        """Return the number of whole rows at hand."""
        return max(0, (len(self.tokens) - 1) // self.seq_len)

    def finish(self) -> None:
        """Do nothing: what does not fill a row is left out."""

    def take(self, rows: int) -> dict[str, Array]:
        """Remove and return tokens (rows, S+1) int64 and loss mask (rows, S) bool."""
        shape, used = (rows, self.seq_len), rows * self.seq_len
        tokens = np.array(self.tokens[: used + 1], np.int64)
        counted = np.array(self.counted[1 : used + 1]).astype(bool)
        del self.tokens[:used], self.counted[:used]
        cut, opening = tokens[:-1].reshape(shape), tokens[self.seq_len :: self.seq_len]
        joined = np.concatenate([cut, opening[:, None]], 1)
        return {"tokens": joined, "loss_mask": counted.reshape(shape)}


@dataclass
class DocumentPacker:
    """Whole documents side by side in rows of S+1 tokens, the last of a row followed by padding.

    The first token of a document is never a label, since nothing before it belongs to it.
    """

    seq_len: int
    too_long: str
    """What becomes of a document longer than a row; see `CacheSpec.too_long`."""
    padding: int
    """The token that fills rows up."""
    lost: int = 0
    waiting: list[Encoded] = field(default_factory=list)
    packed: list[list[Encoded]] = field(default_factory=list)
    """The documents of each finished row."""

    def add(self, document: Encoded) -> None:
        """Append a document, in pieces where it is longer than a row."""
        for piece in self._fitting(*document):
            self.waiting.append(piece)
            enough = WAITING_ROWS * (self.seq_len + 1)
            while len(self.waiting) >= WAITING and _tokens(self.waiting) >= enough:
                self._fill()

    def _fitting(self, tokens: list[int], counted: list[bool]) -> Iterator[Encoded]:
        """Yield a document in pieces of a row at most; each opens with the last token of another.

        So every token but the first is a label in one piece.
        """
        size = self.seq_len + 1
        if len(tokens) <= size or self.too_long == "split":
            for first in range(0, max(1, len(tokens) - 1), self.seq_len):
                yield tokens[first : first + size], counted[first : first + size]
        elif self.too_long == "truncate":
            self.lost += len(tokens) - size
            yield tokens[:size], counted[:size]
        else:
            self.lost += len(tokens)

    def _fill(self) -> None:
        """Fill a row with the document that waited longest, and with those that fit best."""
        first, *others = self.waiting
        lengths = [len(tokens) for tokens, _ in others]
        chosen = fullest(lengths, self.seq_len + 1 - len(first[0]))
        self.packed.append([first, *(others[number] for number in chosen)])
        self.waiting = [other for number, other in enumerate(others) if number not in chosen]

    @property
    def rows(self) -> int:
        """Return the number of finished rows at hand."""
        return len(self.packed)

    def finish(self) -> None:
        """Fill rows until no document waits."""
        while self.waiting:
            self._fill()

    def take(self, rows: int) -> dict[str, Array]:
        """Remove and return tokens (rows, S+1) int64, loss mask (rows, S) bool, and segments.

        `segments` (rows, S+1) int64 are 1, 2, … for the documents of a row, and 0 for padding.
        """
        shape = (rows, self.seq_len + 1)
        tokens, counted = np.full(shape, self.padding, np.int64), np.zeros(shape, bool)
        segments = np.zeros(shape, np.int64)
        for row, documents in enumerate(self.packed[:rows]):
            end = 0
            for number, (ids, flags) in enumerate(documents, 1):
                begin, end = end, end + len(ids)
                tokens[row, begin:end], segments[row, begin:end] = ids, number
                counted[row, begin + 1 : end] = flags[1:]
        del self.packed[:rows]
        return {"tokens": tokens, "loss_mask": counted[:, 1:], "segments": segments}


def _tokens(documents: Sequence[Encoded]) -> int:
    return sum(len(tokens) for tokens, _ in documents)


def fullest(lengths: Sequence[int], room: int) -> list[int]:
    """Return the places, ascending, of the lengths whose sum is the largest up to `room`.

    Of several such choices it is the one with the longest lengths, the first ones among equals.
    Bit n of `reached[k]` says whether some of the k shortest have the sum n (a knapsack whose
    sums are the bits of one integer).
    """
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], -place))
    order = [place for place in order if lengths[place] <= room]
    within, reached = (1 << (room + 1)) - 1, [1]
    for place in order:
        reached.append(reached[-1] | (reached[-1] << lengths[place] & within))
    left, chosen = reached[-1].bit_length() - 1, []
    for place, before in zip(reversed(order), reversed(reached[:-1]), strict=True):
        if lengths[place] <= left and before >> (left - lengths[place]) & 1:
            chosen.append(place)
            left -= lengths[place]
    return sorted(chosen)
