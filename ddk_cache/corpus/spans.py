"""Text of which some spans are learned → tokens, each marked as learned or not.

A control token that somebody wrote into a document is text there, and must not become the control
token. Private characters stand for it while a chat template puts its own control tokens around. The
price is that the text on both sides of it is tokenized apart.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

Encoded = tuple[list[int], list[bool]]
"""The tokens of a document, and for each whether it is a label that the loss counts."""

Span = tuple[int, int]
"""Where a part of a text begins and ends."""

_MARKS = re.compile("\ue000([0-9]{1,6})\ue001")
"""What stands for a control token that is text."""


class Sample(NamedTuple):
    """A text, and the spans of it that are learned."""

    text: str
    spans: Sequence[Span]


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the control tokens of a tokenizer."""
    return tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)


def guard(value: Any, control: tuple[str, ...]) -> Any:
    """Return plain JSON values in whose texts a mark stands for each control token."""
    if isinstance(value, str):
        return _pattern(control).sub(lambda found: _mark(control.index(found[0])), value)
    if isinstance(value, list):
        return [guard(item, control) for item in value]
    if isinstance(value, dict):
        return {key: guard(item, control) for key, item in value.items()}
    return value


@functools.lru_cache(4)
def _pattern(control: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(control, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def encode_sample(tokenizer: Any, sample: Sample, control: tuple[str, ...]) -> Encoded:
    """Tokenize a text that `guard` has marked. A token is learned if it has a part in a span."""
    ids: list[int] = []
    learned: list[bool] = []
    for first, piece, literal in _pieces(sample.text, control):
        out = tokenizer(
            piece,
            add_special_tokens=False,
            split_special_tokens=literal,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids += out["input_ids"]
        for start, stop in out["offset_mapping"]:
            if literal:  # the mark is of another length
                start = stop = 0
            start, stop = first + start, first + max(stop, start + 1)
            learned.append(any(max(start, begin) < min(stop, end) for begin, end in sample.spans))
    return ids, learned


def _pieces(text: str, control: Sequence[str]) -> list[tuple[int, str, bool]]:
    """Split a text at its marks: (place in the text, piece, whether it was a mark)."""
    pieces, place = [], 0
    for mark in _MARKS.finditer(text):
        if int(mark[1]) >= len(control):  # private characters of the document itself
            continue
        pieces.append((place, text[place : mark.start()], False))
        pieces.append((mark.start(), control[int(mark[1])], True))
        place = mark.end()
    pieces.append((place, text[place:], False))
    return [piece for piece in pieces if piece[1]]
