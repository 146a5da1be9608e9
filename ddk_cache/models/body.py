"""A model taken apart: a body that gives hidden states, and a head that is applied in chunks.

The logits of a batch are the largest thing that a forward pass makes: at a vocabulary of 152 k a
position has 608 kB of them, and 4 kB of hidden states. So the body runs over whole rows, and the
head over chunks of positions, of which the targets are extracted at once. A hook on the head
catches what it gets and lets nothing through, so that everything before it is the model's own:
norms, projections, devices and parts of other processes. Models differ in what they do after the
head, so both are compared once on a few tokens, with logits large enough to show a cap; where they
differ, the model's own logits are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ddk_cache.build.targets import Scores, extract_hidden
from ddk_cache.build.teacher import Teacher
from ddk_cache.format.spec import TargetSpec
from ddk_cache.head import finish, scale_and_cap

Body = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(B, S) tokens and, where rows hold several documents, their (B, S) positions → (B, S, H)."""

PROBE_SIZE = 100.0
"""Size of the largest logit when head and model are compared; caps are near 30."""

PROBE_TOKENS = 8


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

    def scores(
        self,
        tokens_BS1: torch.Tensor,
        chosen_B: torch.Tensor,
        targets: TargetSpec,
        *,
        temperatures: tuple[float, ...],
        offsets_BS: torch.Tensor,
        positions_BS: torch.Tensor | None = None,
    ) -> tuple[Scores, torch.Tensor | None]:
        """Return the targets of B rows, and the logits (B, V) of one position of each row."""
        hidden_BSH = self.body(tokens_BS1[:, :-1], positions_BS)
        scores = extract_hidden(
            hidden_BSH,
            self.head,
            tokens_BS1[:, 1:],
            targets,
            vocab_size=self.vocab_size,
            temperatures=temperatures,
            offsets_BS=offsets_BS,
        )
        rows = torch.arange(len(hidden_BSH), device=hidden_BSH.device)
        return scores, self.head(hidden_BSH[rows, chosen_B.to(hidden_BSH.device)])


def take_apart(model: Any, device: torch.device) -> Parts | str:
    """Return a causal language model in two, or why only its own logits will do.

    `device` is that of the model's tokens.
    """
    linear, kind = model.get_output_embeddings(), type(model).__name__
    config = model.config.get_text_config()
    if linear is None:
        return f"{kind} has no output projection."
    scale, cap = scale_and_cap(config)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return finish(linear(hidden), scale, cap)

    def body(tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None) -> torch.Tensor:
        own = {} if positions_BS is None else {"position_ids": positions_BS}
        return head_input(model, linear, input_ids=tokens_BS, **own)

    try:
        error = difference(model, linear, body, head, config.vocab_size, device)
    except (ValueError, RuntimeError, IndexError, TypeError, AttributeError) as found:
        return f"the head of {kind} cannot be applied apart ({found})."
    if not error <= 1e-3:
        return f"{kind} changes its logits after its head in an unknown way (off by {error:.2g})."
    inner = max(getattr(config, "intermediate_size", None) or 0, 4 * config.hidden_size)
    return Parts(body, head, 3 * inner + 4 * config.hidden_size)


def head_input(model: Any, linear: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """Run a model up to its head; return what the head gets, (B, S, H)."""
    caught: list[torch.Tensor] = []

    def catch(_: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        caught.append(given[0])
        return (given[0][:, :0],)

    hook = linear.register_forward_pre_hook(catch)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    (hidden_BSH,) = caught
    return hidden_BSH


@torch.inference_mode()
def difference(
    model: Any,
    linear: torch.nn.Module,
    body: Body,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    device: torch.device,
) -> float:
    """Return the largest error of body and head, relative to the largest logit of the model.

    Rounding to the model's type is not an error.
    """
    tokens = torch.arange(1, 1 + PROBE_TOKENS, device=device)[None] % vocab_size
    hidden = body(tokens, None)
    factor = PROBE_SIZE / linear(hidden).abs().amax().clamp_min(1e-6)
    hook = linear.register_forward_pre_hook(lambda _, given: (given[0] * factor,))
    try:
        expected = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    got = head(hidden * factor)
    if got.shape != (*tokens.shape, vocab_size) or got.shape != expected.shape:
        return torch.inf
    off = (got.float() - expected.float().to(got.device)).abs().amax()
    rounding = 2 * torch.finfo(got.dtype).eps
    return max(0.0, float(off / expected.float().abs().amax()) - rounding)
