"""Log-probabilities of tokens under the student, differentiable, in chunks of positions.

A loss on whole responses needs the sum of log q over a response before the weight of any of its
positions is known, so the gradient cannot be made in the forward pass as in
`ddk_train.loss.fused`. Here the logits of a chunk are computed twice, once for the values and once
for the gradient: a fourth matrix product, and [positions, V] is never in memory.

Shape letters: P positions, H hidden, V vocabulary, B rows.
"""

from __future__ import annotations

from typing import Any

import torch

from ddk_train.loss.fused import softmax_
from ddk_train.loss.head import Gradients, Head, in_chunks


def token_logprobs(hidden_PH: torch.Tensor, head: Head, labels_P: torch.Tensor) -> torch.Tensor:
    """Return log q of each label (P) float32, nats, under a head; differentiable."""
    with torch.autocast(hidden_PH.device.type, enabled=False):
        found: torch.Tensor = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden_PH, head.weight, head.bias, head, labels_P
        )
    return found


def row_sums(values_P: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    """Return (B) sums of the values of counted positions, which follow one another by row."""
    row_P = mask_BS.nonzero()[:, 0]
    return values_P.new_zeros(len(mask_BS)).index_add(0, row_P, values_P)


class _TokenLogprobs(torch.autograd.Function):
    """Logits of a chunk twice: for the values, and again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PH: torch.Tensor,
        weight_VH: torch.Tensor | None,
        bias_V: torch.Tensor | None,
        head: Head,
        labels_P: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_PH, labels_P)
        ctx.head = head
        logq_P = hidden_PH.new_empty(len(hidden_PH), dtype=torch.float32)
        for part, logits_PW in in_chunks(hidden_PH, head.like(hidden_PH.dtype)):
            label_P = logits_PW.gather(-1, labels_P[part, None])[:, 0]
            logq_P[part] = label_P - logits_PW.logsumexp(-1)
        return logq_P

    @staticmethod
    def backward(ctx: Any, grad_P: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Spread (one-hot − q) · grad to the hidden states and the head."""
        hidden_PH, labels_P = ctx.saved_tensors
        gradients = Gradients(hidden_PH, ctx.head, ctx.needs_input_grad)
        for part, logits_PW in gradients.from_chunks():
            label_P1 = labels_P[part, None]
            softmax_(logits_PW)
            logits_PW.neg_().scatter_add_(-1, label_P1, torch.ones_like(logits_PW[:, :1]))
            logits_PW.mul_(grad_P[part, None])
        return *gradients.tensors, None, None
