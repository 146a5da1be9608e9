"""The distillation loss of a causal language model: its head fused with the loss.

A model runs up to its head, and the fused loss replaces the head, so that no logits are stored.
A hook on the head catches the hidden states and lets nothing through to the projection: this
works behind any wrapper (DDP, accelerate, peft), because the wrapper's own forward runs. Models
differ in what they do after the head, so head and model are compared once on a few tokens, with
logits large enough to show a cap. Where they differ, or where there is no plain linear head, the
model's own logits are used; that takes more memory, and a warning says so. The price of the hook:
sharded weights (FSDP) are not gathered outside of the model's forward and are not supported.

Shape letters: B rows, S positions, P counted positions, K kept entries, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from ddk_cache import InputError, SparseTargets
from ddk_cache.head import head_input, scale_and_cap, why_whole
from ddk_cache.isolation import check_isolation
from ddk_train.data.dataset import IGNORED
from ddk_train.loss.divergences import divergence
from ddk_train.loss.fused import Sums, Targets, Terms, fused_loss, measure, pick, within
from ddk_train.loss.head import Head
from ddk_train.loss.sequence import token_logprobs

log = logging.getLogger(__name__)

Mask = torch.Tensor | tuple[torch.Tensor, ...]
"""(B, S) bool, the positions that count; or (P) their rows and (P) their columns: both index what
is (B, S, …), but the first makes the host wait for the device each time, to know P."""


@dataclass(frozen=True)
class Parts:
    """The head of a model, and what the model does with its output."""

    linear: torch.nn.Linear
    scale: float
    cap: float

    def head(self, narrow: bool) -> Head:
        """Return the head with its present weights."""
        return Head(self.linear.weight, self.linear.bias, self.scale, self.cap, narrow)


class Objective(torch.nn.Module):
    """Cross-entropy and divergence of a student, summed over counted positions.

    `ddk-train` wraps this module for several processes, and nothing else.
    """

    def __init__(self, student: Any, terms: Terms, teacher_width: int, bf16: bool) -> None:
        super().__init__()
        self.student, self.terms, self.bf16 = student, terms, bf16
        self.parts = parts_of(student)
        self.narrow = width(student) < teacher_width

    def forward(
        self,
        tokens_BS1: torch.Tensor,
        mask_BS: Mask,
        targets: Targets | None,
        positions_BS1: torch.Tensor | None = None,
        *,
        apart: bool = False,
    ) -> Sums | torch.Tensor:
        """Return the sums over the positions that `mask` counts.

        `tokens` has one more column than `mask`: the last column is a label only. In place of the
        mask, the `places` that it counts may be given. With `positions`, the documents of a row
        are kept apart. `apart` returns the log-probability (P) of each counted token instead, in
        the order of the mask.
        """
        hidden_PH, head = self._hidden(tokens_BS1, mask_BS, positions_BS1)
        if apart:
            return token_logprobs(hidden_PH, head, tokens_BS1[:, 1:][mask_BS])
        targets = targets and self._counted(targets, mask_BS)
        return fused_loss(hidden_PH, head, tokens_BS1[:, 1:][mask_BS], targets, self.terms)

    @torch.no_grad()
    def measure(
        self,
        tokens_BS1: torch.Tensor,
        mask_BS: torch.Tensor,
        targets: Targets,
        positions_BS1: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return sums of cross-entropy and KL(teacher ‖ student) by row, no gradients; (2, B)."""
        at = places(mask_BS)
        hidden_PH, head = self._hidden(tokens_BS1, at, positions_BS1)
        targets = self._counted(targets, at)
        ce_P, kl_P = measure(hidden_PH, head, tokens_BS1[:, 1:][at], targets)
        return torch.stack([by_row(ce_P, mask_BS), by_row(kl_P, mask_BS)])

    def _counted(self, targets: Targets, mask_BS: Mask) -> Targets:
        """Return the targets (P, K) of counted positions, for a head of the student's width."""
        targets = pick(targets, mask_BS)
        return within(targets, width(self.student)) if self.narrow else targets

    def _hidden(
        self, tokens_BS1: torch.Tensor, mask_BS: Mask, positions_BS1: torch.Tensor | None
    ) -> tuple[torch.Tensor, Head]:
        rows = tokens_BS1, mask_BS, positions_BS1
        with torch.autocast(tokens_BS1.device.type, torch.bfloat16, enabled=self.bf16):
            return hidden_and_head(self.student, self.parts, *rows, self.narrow)

    def compile_body(self) -> None:
        """Compile the student up to its head; `Terms.compiled` is about the rest."""
        model = base(self.student)
        (model if self.parts is None else getattr(model, model.base_model_prefix, model)).compile()


def by_row(value_P: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    """Return the sums (B) float64 over rows of values at counted positions."""
    value_BS = torch.zeros(mask_BS.shape, dtype=torch.float64, device=mask_BS.device)
    return value_BS.masked_scatter_(mask_BS, value_P.double()).sum(1)


def distillation_loss(
    model: Any,
    batch: Mapping[str, torch.Tensor],
    *,
    gamma: float = 0.2,
    loss: str = "forward_kl",
    temperature: float = 1.0,
    positions: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Return CE + γ · T² · D(teacher ‖ student), the mean over counted positions, in nats.

    `model` is a causal language model of transformers: bare, with a peft adapter, or wrapped by
    DDP or accelerate. `batch` comes from a `CacheDataset` of the same temperature and lies on the
    model's device. With gradient accumulation over several batches, pass their number of counted
    positions as `positions`, and add the losses up. The gradient can be computed only once.

    Raises:
        InputError: the loss is unknown, the batch is not one of a CacheDataset, or the model does
            not keep the documents of its rows apart.
    """
    check_batch(batch)
    terms = Terms(gamma, divergence(loss), temperature)
    tokens_BS1, labels_P, mask_BS, targets, narrow = counted(model, batch)
    rows = tokens_BS1, mask_BS, batch.get("position_ids")
    hidden_PH, head = hidden_and_head(model, parts_of(model), *rows, narrow)
    total = fused_loss(hidden_PH, head, labels_P, targets, terms).loss
    return total / (max(1, len(labels_P)) if positions is None else positions)


def counted(
    model: Any, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, Mask, Targets, bool]:
    """Return tokens (B, S+1), labels (P), mask (B, S), targets (P, K), and whether V is narrow."""
    mask_BS = places(batch["labels"][:, 1:] != IGNORED)
    kept = SparseTargets(batch["target_ids"], batch["target_probs"], batch["target_tail"])
    targets, V = pick(kept, mask_BS), width(model)
    narrow = bool((targets.ids >= V).any())
    labels_P = batch["labels"][:, 1:][mask_BS]
    return batch["input_ids"], labels_P, mask_BS, within(targets, V) if narrow else targets, narrow


def check_batch(batch: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError where a tensor of the loss is missing."""
    needed = ("input_ids", "labels", "target_ids", "target_probs", "target_tail")
    if missing := [name for name in needed if name not in batch]:
        raise InputError(
            f"distillation_loss: the batch has no {', '.join(missing)}. Pass the batches of a "
            "CacheDataset, and with a Trainer set remove_unused_columns=False."
        )


def places(mask_BS: Mask, count: int | None = None) -> Mask:
    """Return the rows and columns (P) of the positions that a mask counts.

    The host waits for the device to count them, unless it knows their number.
    """
    if isinstance(mask_BS, tuple):
        return mask_BS
    found_P2 = mask_BS.nonzero_static(size=count) if count else mask_BS.nonzero()
    return found_P2.unbind(1)


# --- a model and its head ---


def hidden_and_head(
    model: Any,
    parts: Parts | None,
    tokens_BS1: torch.Tensor,
    mask_BS: Mask,
    positions_BS1: torch.Tensor | None,
    narrow: bool,
) -> tuple[torch.Tensor, Head]:
    """Return what the head gets at counted positions (P, H), in the dtype of products, and head.

    Without parts, the hidden states are the model's own logits.

    Raises:
        InputError: there are positions, and the model does not keep documents apart.
    """
    inputs = {"input_ids": tokens_BS1[:, :-1]}
    if positions_BS1 is not None:
        require_isolation(model)
        inputs["position_ids"] = positions_BS1[:, :-1]
    if parts is None:
        return model(**inputs, use_cache=False).logits[mask_BS], Head(narrow=narrow)
    return head_input(model, parts.linear, **inputs)[mask_BS], parts.head(narrow)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode during a with block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def base(model: Any) -> Any:
    """Return the model of transformers within wrappers and adapters."""
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def width(model: Any) -> int:
    """Return the number of the model's outputs, V."""
    return int(base(model).config.get_text_config().vocab_size)


PARTS: WeakKeyDictionary[torch.nn.Module, Parts | None] = WeakKeyDictionary()
"""What is known of the models that were taken apart."""


ISOLATING: WeakSet[torch.nn.Module] = WeakSet()
"""Models that were found to keep the documents of a row apart."""


def require_isolation(model: Any) -> None:
    """Raise InputError where a student does not keep the documents of a row apart.

    It is tried once, in evaluation mode and in the type of its weights.
    """
    whole = base(model)
    if whole in ISOLATING:
        return

    def logits(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = whole(
            input_ids=tokens, position_ids=positions, use_cache=False
        ).logits
        return found

    who, device = f"the student ({type(whole).__name__})", next(whole.parameters()).device
    longest = getattr(whole.config.get_text_config(), "max_position_embeddings", None)
    with evaluating(whole), torch.autocast(device.type, enabled=False):
        check_isolation(who, logits, width(model), device, longest)
    ISOLATING.add(whole)


def parts_of(model: Any) -> Parts | None:
    """Return the parts of a model, or None with a warning where its logits are needed.

    The comparison runs once per model, and again when its head is replaced.
    """
    whole = base(model)
    known = PARTS.get(whole)
    if whole not in PARTS or (known and known.linear is not whole.get_output_embeddings()):
        parts = take_apart(whole)
        if isinstance(parts, str):
            log.warning(f"the loss is not fused with the head, which takes more memory: {parts}")
        PARTS[whole] = None if isinstance(parts, str) else parts
    return PARTS[whole]


@torch.no_grad()
def take_apart(model: Any) -> Parts | str:
    """Return the parts of a causal language model, or why its own logits are needed."""
    linear = model.get_output_embeddings()
    if type(linear) is not torch.nn.Linear:
        return f"{type(model).__name__} has no plain linear head."
    V = len(linear.weight)
    parts = Parts(linear, *scale_and_cap(model.config.get_text_config()))

    def head(hidden_BSH: torch.Tensor) -> torch.Tensor:
        out_PV = hidden_BSH.new_empty(hidden_BSH.shape[1], V, dtype=torch.float32)
        return parts.head(False).logits(hidden_BSH[0], out_PV)[None]

    with evaluating(model):
        return why_whole(model, linear, head, V, linear.weight.device) or parts
