"""One row of a cache as text, with what is learned of it marked.

A row is decoded in runs of tokens that are alike, never token by token, since a character may be
several tokens. The price is that a character which two runs share is shown as "�".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddk_cache.errors import RowRangeError
from ddk_cache.format.plan import rows_at
from ddk_cache.read.cache import Cache
from ddk_cache.types import Array

ARRAYS = ("tokens", "loss_mask", "segments")
"""What is read of a row, where the cache has it."""

STYLES = {(True, True): "bold cyan", (True, False): "bold green", (False, True): "cyan"}
"""(Learned, control token) → how a terminal shows it."""


@dataclass(frozen=True)
class Piece:
    """A run of tokens that are alike."""

    text: str
    tokens: list[int]
    learned: bool
    """Whether the loss counts them as labels. The first token of a row is no label."""
    control: bool
    """Whether they are control tokens."""
    document: int | None
    """Number of the document in the row, 0 for padding; None where the cache does not say."""


def read_pieces(cache: Cache, domain: str, split: str, row: int) -> list[Piece]:
    """Return the pieces of a row, counted from 0, as the tokenizer of the cache decodes them.

    Raises:
        UnknownNameError, RowRangeError: there is no such domain, split or row.
        UnfinishedCacheError, CorruptCacheError: see `Cache.fill`.
    """
    found = cache[domain][split]
    if not 0 <= row < len(found):
        raise RowRangeError(f"{found}: there is no row {row:,}; it has {len(found):,} rows.")
    numbers = rows_at(cache.extents(domain, split), np.array([row]))
    names = [name for name in ARRAYS if name in cache.spec.arrays]
    stored = {
        name: array[0] for name, array in cache.read_stored(domain, split, numbers, names).items()
    }
    from ddk_cache.hf import load_tokenizer  # imports torch, so a wrong call is refused before

    learned = np.insert(stored["loss_mask"].astype(bool), 0, False)
    tokenizer = load_tokenizer(cache.tokenizer_path)
    return pieces_of(stored["tokens"], learned, stored.get("segments"), tokenizer)


def pieces_of(
    tokens: Array, learned: Array, documents: Array | None, tokenizer: Any
) -> list[Piece]:
    """Return the pieces of S+1 tokens, given which are learned and in which document each is."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    kinds = zip(
        learned.tolist(),
        (token in special for token in tokens.tolist()),
        itertools.repeat(None) if documents is None else documents.tolist(),
        strict=False,
    )
    pieces, text, end = [], "", 0
    for (is_learned, is_control, document), run in itertools.groupby(kinds):
        start, end = end, end + sum(1 for _ in run)
        before, text = text, tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        ids = tokens[start:end].tolist()
        pieces.append(Piece(text[len(before) :], ids, is_learned, is_control, document))
    return pieces


def show(pieces: Sequence[Piece]) -> None:
    """Print a row: in colors on a terminal; elsewhere « and » enclose what is learned."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    marks = not console.is_terminal or console.is_dumb_terminal
    for document, of_document in itertools.groupby(pieces, key=lambda piece: piece.document):
        line = Text()
        for is_learned, run in itertools.groupby(of_document, key=lambda piece: piece.learned):
            line.append("«" if is_learned and marks else "")
            for piece in run:
                line.append(_visible(piece.text), STYLES.get((piece.learned, piece.control), ""))
            line.append("»" if is_learned and marks else "")
        if document is not None:
            console.print(Text(f"--- document {document} ---" if document else "--- padding ---"))
        if document != 0:
            console.print(line)


def _visible(text: str) -> str:
    """Return text with what a terminal would obey, escape sequences for example, spelled out."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
