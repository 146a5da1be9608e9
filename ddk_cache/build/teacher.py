"""Token rows → next-token logits: any causal language model, or any callable.

A teacher is a function with a name, so that the whole pipeline runs on a CPU in seconds with a
function of a few lines in the place of a large model. Scoring is pure prefill, so a plain forward
pass in large batches is the whole engine; a serving engine would add a process and take away the
raw logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from ddk_cache.build.targets import Scores, extract
from ddk_cache.errors import InputError, unknown
from ddk_cache.format.spec import TargetSpec
from ddk_cache.hashing import canonical, digest
from ddk_cache.hf import load, pick_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A teacher and who it is."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    """(B, S) int64 tokens on `device` → (B, S, V) logits of the next token."""
    vocab_size: int
    """V"""
    identity: Mapping[str, str]
    """Hashes by content; two teachers of one identity give one cache."""
    name: str = "a callable"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    positions: int | None = None
    """The longest row that the teacher was made for, where there is such a limit."""
    batch_rows: int | None = None
    """Rows of one call, where that is not for the memory of their logits to decide."""

    def scores(
        self,
        tokens_BS1: torch.Tensor,
        chosen_B: torch.Tensor,
        targets: TargetSpec,
        *,
        temperatures: tuple[float, ...],
        offsets_BS: torch.Tensor,
    ) -> tuple[Scores, torch.Tensor | None]:
        """Return the targets of B rows, and the logits (B, V) of one position of each row.

        `chosen_B` are those positions; a teacher that has no logits returns None for them.
        """
        logits = self.logits(tokens_BS1[:, :-1])
        labels_BS, rows = tokens_BS1[:, 1:], torch.arange(len(tokens_BS1))
        scores = extract(
            logits, labels_BS, targets, temperatures=temperatures, offsets_BS=offsets_BS
        )
        return scores, logits[rows, chosen_B]


def no_teacher(vocab_size: int) -> Teacher:
    """Return a teacher that cannot be asked, to count rows with."""

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        raise InputError("there is no teacher to ask.")

    return Teacher(logits, vocab_size, {}, "none")


def load_teacher(
    name: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Teacher:
    """Load a causal language model from a directory or the hub.

    `dtype` "auto" is the checkpoint's own on CUDA, and float32 on a CPU, where the short types
    are slower.

    Raises:
        InputError: there is no such model, dtype or device.
    """
    target = pick_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(unknown("dtype", dtype, [*DTYPES, "auto"]))
    wanted = "float32" if dtype == "auto" and target.type == "cpu" else dtype
    model = load(
        *("teacher", "AutoModelForCausalLM", name),
        dtype=DTYPES.get(wanted, wanted),
        trust_remote_code=trust_remote_code,
    )
    model.eval().requires_grad_(False).to(target)

    def logits(tokens_BS: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(input_ids=tokens_BS, use_cache=False).logits
        return out

    return Teacher(logits, model.config.get_text_config().vocab_size, identify(model), name, target)


def identify(model: torch.nn.Module) -> dict[str, str]:
    """Return the class, dtype and content hashes (configuration, weights) of a model."""
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
    for beside in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(beside, None)
    weights = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return {
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "config": digest(canonical(config)),
        "weights": weights.hexdigest(),
    }
