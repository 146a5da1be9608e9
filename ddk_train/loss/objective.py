"""A student and its loss as one module: what is wrapped for many processes, and nothing else.

A model is taken apart into its body, which gives hidden states, and its head, which is fused with
the loss. Models differ in what they do after the head, so the parts are put together once on a
few tokens and compared with the model itself; where they do not agree, or there is no such head,
its own logits are taken, which costs memory, and that is said. The comparison makes the logits so
large that a cap would show.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from ddk_cache.head import scale_and_cap
from ddk_train.loss.fused import Head, Sums, Targets, Terms, fused_loss, measure, pick, within

log = logging.getLogger(__name__)

PROBE_SIZE = 100.0
"""Size of the largest logit when parts and model are compared; caps are near 30."""


@dataclass(frozen=True)
class Parts:
    """A model taken apart."""

    body: torch.nn.Module
    """tokens → hidden states"""
    linear: torch.nn.Linear
    scale: float
    cap: float

    def head(self, narrow: bool) -> Head:
        """Return the head as it is now."""
        return Head(self.linear.weight, self.linear.bias, self.scale, self.cap, narrow)


class Objective(torch.nn.Module):
    """Cross-entropy and divergence of a student, summed over counted positions."""

    def __init__(self, student: Any, terms: Terms, teacher_width: int, bf16: bool) -> None:
        super().__init__()
        self.student, self.terms, self.bf16 = student, terms, bf16
        parts = take_apart(student)
        if isinstance(parts, str):
            log.warning(f"the loss is not fused with the head, which takes more memory: {parts}")
        self.parts = None if isinstance(parts, str) else parts
        self.width = student.config.get_text_config().vocab_size
        self.narrow = self.width < teacher_width

    def forward(
        self, tokens_BS1: torch.Tensor, mask_BS: torch.Tensor, targets: Targets | None
    ) -> Sums:
        """Return the sums over the positions that `mask` counts.

        `tokens` has one more column than `mask`: its last is a label only.
        """
        hidden_PH, head = self._hidden(tokens_BS1, mask_BS)
        targets = targets and self._counted(targets, mask_BS)
        return fused_loss(hidden_PH, head, tokens_BS1[:, 1:][mask_BS], targets, self.terms)

    @torch.no_grad()
    def measure(
        self, tokens_BS1: torch.Tensor, mask_BS: torch.Tensor, targets: Targets
    ) -> torch.Tensor:
        """Return the sums of cross-entropy and KL(teacher ‖ student), without gradients; (2)."""
        hidden_PH, head = self._hidden(tokens_BS1, mask_BS)
        targets = self._counted(targets, mask_BS)
        return measure(hidden_PH, head, tokens_BS1[:, 1:][mask_BS], targets)

    def _counted(self, targets: Targets, mask_BS: torch.Tensor) -> Targets:
        """Return the targets (P, K) of counted positions, for a head of the student's width."""
        targets = pick(targets, mask_BS)
        return within(targets, self.width) if self.narrow else targets

    def _hidden(self, tokens_BS1: torch.Tensor, mask_BS: torch.Tensor) -> tuple[torch.Tensor, Head]:
        """Return hidden states (P, H) of counted positions, in the dtype of products, and head."""
        device = tokens_BS1.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            if self.parts is None:
                out = self.student(input_ids=tokens_BS1[:, :-1], use_cache=False).logits
                return out[mask_BS], Head(narrow=self.narrow)
            out = self.parts.body(input_ids=tokens_BS1[:, :-1], use_cache=False).last_hidden_state
        hidden_PH = out[mask_BS]
        return hidden_PH.bfloat16() if self.bf16 else hidden_PH, self.parts.head(self.narrow)

    def compile_body(self) -> None:
        """Compile the student's body; of the head, see `Terms.compiled`."""
        (self.student if self.parts is None else self.parts.body).compile()


def take_apart(student: Any) -> Parts | str:
    """Return the parts of a causal language model, or why it has to stay whole."""
    model = student.get_base_model() if hasattr(student, "get_base_model") else student
    linear, body = model.get_output_embeddings(), getattr(model, model.base_model_prefix, None)
    if type(linear) is not torch.nn.Linear or body is None:
        return f"{type(model).__name__} has no plain linear head on a body of its own."
    parts = Parts(body, linear, *scale_and_cap(model.config.get_text_config()))
    error = difference(model, parts)
    if error > 1e-3:
        return f"what {type(model).__name__} does after its head is not known (off by {error:.2g})."
    return parts


@torch.no_grad()
def difference(model: Any, parts: Parts) -> float:
    """Return how far the parts are from the model, relative to the largest logit."""
    training = model.training
    model.eval()
    tokens = torch.arange(1, 9, device=parts.linear.weight.device)[None] % len(parts.linear.weight)
    out = parts.body(input_ids=tokens, use_cache=False)
    hidden = getattr(out, "last_hidden_state", torch.zeros(1))
    if hidden.shape[-1] != parts.linear.in_features:
        return torch.inf
    factor = PROBE_SIZE / parts.linear(hidden).abs().max().clamp_min(1e-30)
    hook = parts.linear.register_forward_pre_hook(lambda _, given: (given[0] * factor,))
    expected = model(input_ids=tokens, use_cache=False).logits.float()
    hook.remove()
    model.train(training)
    got = parts.head(False).logits(hidden[0] * factor, torch.empty_like(expected[0]))
    return float((got - expected[0]).abs().max() / expected.abs().max())
