"""Hidden states → logits in chunks of positions, and the gradients of that.

A loss sees the logits of one chunk and leaves their gradient in the same memory, so [positions, V]
is never there.

Shape letters: P positions, H hidden, V vocabulary, W with the spare output of a narrow head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}
"""Most bytes of the float32 logits of a chunk. On a CPU with 32 MiB of L3, 4 to 32 MiB differed by
a fifth for V = 16,384, and 2 MiB took 1.4 times as long. On CUDA: enough to fill the device, little
compared with the activations, and less on a small device (`SHARE_OF_DEVICE`)."""

SHARE_OF_DEVICE = 2**-8
"""Most of a GPU's memory for the logits of a chunk. A share of all memory and not of the free:
that varies from step to step, chunks decide the last bits of a sum, and a resumed run would differ
from one that was never stopped."""

LEAST_POSITIONS = 256
"""Fewest positions of a chunk: each chunk reads the whole head and its gradient once, and with 32
positions that alone made V = 128,256 take 1.4 times as long."""


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: cap · tanh(scale · (h·Wᵀ + bias) / cap).

    Without a weight the hidden states are the logits.
    """

    weight: torch.Tensor | None = None
    """(V, H), the matrix W; it may be tied to the embedding."""
    bias: torch.Tensor | None = None
    """(V)"""
    scale: float = 1.0
    cap: float = 0.0
    """The soft cap; 0 means none."""
    narrow: bool = False
    """The teacher's head is wider: one spare output without mass stands for the ids that only the
    teacher has; see `ddk_train.loss.fused.within`."""

    def logits(self, hidden_PH: torch.Tensor, out_PV: torch.Tensor) -> torch.Tensor:
        """Write logits to a float32 tensor (P, V), and return it."""
        if self.weight is None:
            out_PV.copy_(hidden_PH)
        elif self.bias is None and self.weight.dtype == out_PV.dtype:
            torch.mm(hidden_PH, self.weight.T, out=out_PV)
        else:
            out_PV.copy_(linear(hidden_PH, self.weight, self.bias))
        if self.scale != 1:
            out_PV.mul_(self.scale)
        if self.cap:
            out_PV.div_(self.cap).tanh_().mul_(self.cap)
        return out_PV

    def slope(self, logits_PV: torch.Tensor) -> torch.Tensor | float:
        """Return the derivative of the logits by h·Wᵀ + bias."""
        if not self.cap:
            return self.scale
        return (logits_PV / self.cap).square_().neg_().add_(1.0).mul_(self.scale)

    def like(self, dtype: torch.dtype) -> Head:
        """Return the head with its tensors detached and of this dtype."""
        tensors = (self.weight, self.bias)
        weight, bias = (t if t is None else t.detach().to(dtype) for t in tensors)
        return replace(self, weight=weight, bias=bias)


def in_chunks(hidden_PH: torch.Tensor, head: Head) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the positions of each chunk and their float32 logits (…, W); spare outputs have −∞.

    All chunks use the same memory: allocating each chunk anew fragmented the heap of a process on
    a CPU and made it a fifth larger.
    """
    P, H = hidden_PH.shape
    V = H if head.weight is None else len(head.weight)
    size = min(P, chunk_positions(hidden_PH.device, V))
    room_PW = hidden_PH.new_empty((size, V + head.narrow), dtype=torch.float32)
    for first in range(0, P, size or 1):
        part = slice(first, min(first + size, P))
        logits_PW = room_PW[: part.stop - first]
        head.logits(hidden_PH[part], logits_PW[:, :V])
        logits_PW[:, V:] = -torch.inf
        yield part, logits_PW


def chunk_positions(device: torch.device, V: int) -> int:
    """Return the number of positions of a chunk, the same at every step on a device."""
    most = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        most = min(most, int(memory * SHARE_OF_DEVICE))
    return max(LEAST_POSITIONS, most // (4 * V))


class Gradients:
    """The gradients of hidden states, weight and bias of a head, made chunk by chunk."""

    def __init__(self, hidden_PH: torch.Tensor, head: Head, wanted: Sequence[bool]) -> None:
        """`wanted` is the `needs_input_grad` of hidden states, weight, bias, and any others.

        Products are computed in the dtype of the hidden states; a gradient has that of its tensor.
        """
        self.hidden_PH, self.head = hidden_PH, head.like(hidden_PH.dtype)
        self.d_hidden_PH = torch.empty_like(hidden_PH)
        self.d_weight_VH, self.d_bias_V = (
            torch.zeros_like(tensor) if tensor is not None and asked else None
            for tensor, asked in zip((head.weight, head.bias), wanted[1:3], strict=True)
        )

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of hidden states, weight and bias; None for one not wanted."""
        return self.d_hidden_PH, self.d_weight_VH, self.d_bias_V

    def from_chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield chunks as `in_chunks` does; the caller overwrites logits by their gradient."""
        for part, logits_PW in in_chunks(self.hidden_PH, self.head):
            logits_PV = logits_PW[:, : logits_PW.shape[-1] - self.head.narrow]
            slope = self.head.slope(logits_PV)  # of the logits, which are about to go
            yield part, logits_PW
            if not isinstance(slope, float) or slope != 1:
                logits_PV.mul_(slope)
            self._add(part, logits_PV)

    def _add(self, part: slice, gradient_PV: torch.Tensor) -> None:
        """Multiply the gradient of h·Wᵀ + bias at some positions out."""
        hidden_PH, weight_VH, d_weight_VH = self.hidden_PH[part], self.head.weight, self.d_weight_VH
        if self.d_bias_V is not None:
            self.d_bias_V += gradient_PV.sum(0)
        if weight_VH is None:
            self.d_hidden_PH[part] = gradient_PV
            return
        gradient_PV = gradient_PV.to(hidden_PH.dtype)
        torch.mm(gradient_PV, weight_VH, out=self.d_hidden_PH[part])
        if d_weight_VH is None:
            return
        if d_weight_VH.dtype == hidden_PH.dtype:
            d_weight_VH.addmm_(gradient_PV.T, hidden_PH)
        else:
            d_weight_VH += gradient_PV.T @ hidden_PH
