"""Documents apart in one row: the positions that say so to a model, and whether it obeys.

A model of transformers that gets no attention mask and no cache of keys lets no document see
another where position ids begin anew. Nothing warns where it does not: with some attention
kernels, and with recurrent layers, the state goes on. So a model is tried once before it is used.
The price is one forward pass over two rows of a few tokens, and one over half of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ddk_cache.errors import InputError

PROBE_TOKENS = 8
"""Tokens of each of the two documents on which a model is tried."""

ROUNDING = 64
"""Units of the last place of the largest logit by which the rows of two batches may differ, in the
mean; matrix products of other shapes sum in another order."""

Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(B, S) tokens and positions → (B, S, V) logits."""


def positions_of(segments: torch.Tensor) -> torch.Tensor:
    """Return the positions (B, S) int64 of tokens in their documents, from 0, by their segments."""
    place = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    segments = segments.long()
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return place - place.where(begins, 0).cummax(1).values


@torch.no_grad()
def check_isolation(
    who: str, logits: Logits, vocab_size: int, device: torch.device, longest: int | None
) -> None:
    """Check that a model keeps the documents of a row apart; `longest` is its largest row.

    Two rows that differ in their first document alone must give the same logits in the second,
    and that document by itself must too, but for rounding.

    Raises:
        InputError: they do not, or the model does not take positions; `who` names it.
    """
    size = min(PROBE_TOKENS, longest // 2 if longest else PROBE_TOKENS)
    tokens = torch.arange(3 * size, device=device).view(3, size) % vocab_size
    first, other, second = tokens
    rows = torch.stack([torch.cat([first, second]), torch.cat([other, second])])
    place = torch.arange(size, device=device)[None]
    try:
        one, two = logits(rows, place.repeat(2, 2))[:, size:].float()
        alone = logits(second[None], place)
    except TypeError as error:
        raise InputError(
            f"{who} takes no position ids ({error}), so it cannot keep the documents of a row "
            "apart. Build the cache with --packing stream."
        ) from error
    unit = torch.finfo(alone.dtype).eps * one.abs().amax()
    seen = float((one - two).abs().amax())
    moved = float((one - alone[0].float()).abs().mean())
    if seen > 4 * unit or moved > ROUNDING * unit:
        what = (
            f"logits of a document change by {seen:.2g} with the document before it in the row"
            if seen > 4 * unit
            else f"logits of a document in a row and alone differ by {moved:.2g}"
        )
        raise InputError(
            f"{who} does not keep the documents of a row apart: {what}, expected no change. Use "
            "another implementation of attention (sdpa or eager), or build the cache with "
            "--packing stream."
        )
