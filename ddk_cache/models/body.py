"""A model taken apart: a body that gives hidden states, and a head that is applied in chunks.

The logits of a batch are the largest thing that a forward pass makes: at a vocabulary of 152 k a
position has 608 kB of them, and 4 kB of hidden states. So the body runs over whole rows, and the
head over chunks of positions, of which the targets are extracted at once. Everything before the
head is the model's own: norms, projections, devices and parts of other processes. Models differ in
what they do after it, so both are compared once; where they differ, the model's own logits are
used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ddk_cache.build.targets import Scores, extract_hidden
from ddk_cache.build.teacher import Call, Teacher
from ddk_cache.head import finish, head_input, scale_and_cap, why_whole

Body = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(B, S) tokens and, where rows hold several documents, their (B, S) positions → (B, S, H)."""


class Parts(NamedTuple):
    """A model in two."""

    body: Body
    head: Callable[[torch.Tensor], torch.Tensor]
    """(…, H) → (…, V)"""
    floats: int
    """Values that the body holds for a position at one time, at most."""


@dataclass(frozen=True, kw_only=True)
class BodyTeacher(Teacher):
    """A teacher whose logits exist in chunks only."""

    body: Body
    head: Callable[[torch.Tensor], torch.Tensor]
    """(…, H) → (…, V)"""

    def scores(self, call: Call) -> tuple[Scores, torch.Tensor | None]:
        """Return the targets of B rows, and the logits (B, V) of one position of each row."""
        hidden_BSH = self.body(call.tokens[:, :-1], call.positions)
        scores = extract_hidden(
            hidden_BSH,
            self.head,
            call.tokens[:, 1:],
            call.targets,
            vocab_size=self.vocab_size,
            temperatures=call.temperatures,
            offsets_BS=call.offsets,
        )
        rows = torch.arange(len(hidden_BSH), device=hidden_BSH.device)
        return scores, self.head(hidden_BSH[rows, call.chosen.to(hidden_BSH.device)])


@torch.inference_mode()
def take_apart(model: Any, device: torch.device) -> Parts | str:
    """Return a causal language model in two, or why only its own logits will do.

    `device` is that of the model's tokens.
    """
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    if linear is None:
        return f"{type(model).__name__} has no output projection."
    scale, cap = scale_and_cap(config)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return finish(linear(hidden), scale, cap)

    def body(tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None) -> torch.Tensor:
        own = {} if positions_BS is None else {"position_ids": positions_BS}
        return head_input(model, linear, input_ids=tokens_BS, **own)

    if reason := why_whole(model, linear, head, config.vocab_size, device):
        return reason
    inner = max(getattr(config, "intermediate_size", None) or 0, 4 * config.hidden_size)
    return Parts(body, head, 3 * inner + 4 * config.hidden_size)
