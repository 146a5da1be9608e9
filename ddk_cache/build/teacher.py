"""Token rows → next-token logits: any causal language model, or any callable.

A teacher is a function with a name, so that the whole pipeline runs on a CPU in seconds with a
function of a few lines in place of a large model. Scoring is pure prefill, so a plain forward pass
in large batches is the whole engine. A teacher that needs a serving engine is in
`ddk_cache.served.teacher`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ddk_cache.build.targets import Scores, extract
from ddk_cache.errors import InputError, unknown
from ddk_cache.format.spec import TargetSpec
from ddk_cache.hashing import canonical, digest
from ddk_cache.hf import hash_weights, load_model, pick_device
from ddk_cache.isolation import check_isolation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


CAUSAL_TOKENS = 8
"""Tokens on which a model is tried for looking ahead."""


@dataclass(frozen=True)
class Teacher:
    """A function from tokens to logits, and its identity.

    Raises:
        InputError: the name is not text.
    """

    logits: Callable[..., torch.Tensor]
    """(B, S) int64 tokens on `device` → (B, S, V) logits of the next token. With `takes_positions`
    a second argument may be (B, S) int64 positions: a document begins wherever they are 0, and its
    logits must not depend on any other."""
    vocab_size: int
    """V"""
    identity: Mapping[str, str]
    """Hashes by content; two teachers with equal identities give equal caches."""
    name: str = "a callable"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    positions: int | None = None
    """The longest row that the teacher was made for, where there is such a limit."""
    batch_rows: int | None = None
    """Rows of one call, where the memory of their logits is not what decides it."""
    takes_positions: bool = False
    """Whether `logits` takes positions, so that rows may hold documents that are kept apart."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"name of the teacher: got {self.name!r}, expected text.")

    def __call__(
        self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the (B, S, V) logits. Raises InputError where the function returns others."""
        own = () if positions_BS is None else (positions_BS,)
        out: Any = self.logits(tokens_BS, *own)
        wanted = (*tokens_BS.shape, self.vocab_size)
        if isinstance(out, torch.Tensor) and out.shape == wanted and out.is_floating_point():
            return out
        got = type(out).__name__
        if isinstance(out, torch.Tensor):
            got = f"a {out.dtype} tensor of shape {tuple(out.shape)}"
        raise InputError(
            f"teacher {self.name!r}: got {got}, expected a torch tensor of logits (B, S, V) = "
            f"{wanted}. Return floating-point logits of every position and token."
        )

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
        """Return the targets of B rows, and the logits (B, V) of one position of each row.

        `chosen_B` are those positions. A teacher that has no logits returns None instead. With
        `positions_BS`, the documents of a row are kept apart.
        """
        logits = self(tokens_BS1[:, :-1], positions_BS)
        scores = extract(
            logits, tokens_BS1[:, 1:], targets, temperatures=temperatures, offsets_BS=offsets_BS
        )
        return scores, logits[torch.arange(len(logits), device=logits.device), chosen_B]

    def require_isolation(self) -> None:
        """Raise InputError where the documents of a row would not be kept apart."""
        who = f"teacher {self.name!r}"
        if not self.takes_positions:
            raise InputError(
                f"{who} is a function of tokens alone, so it cannot keep the documents of a row "
                "apart. Give a Teacher with takes_positions, or use --packing stream."
            )
        check_isolation(who, self, self.vocab_size, self.device, self.positions)


def load_teacher(
    name: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Teacher:
    """Load a causal language model from a directory or the hub.

    `dtype` "auto" is the checkpoint's own on CUDA, and float32 on a CPU, where the short types
    are slower. Code that comes with the model runs only with `trust_remote_code`.

    Raises:
        InputError: there is no such model, dtype or device, weights are missing, or the model
            looks ahead.
    """
    target = pick_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(unknown("dtype", dtype, [*DTYPES, "auto"]))
    wanted = "float32" if dtype == "auto" and target.type == "cpu" else dtype
    dtype_given = DTYPES.get(wanted, wanted)
    model = load_model("teacher", name, dtype=dtype_given, trust_remote_code=trust_remote_code)
    model.eval().requires_grad_(False).to(target)

    def logits(tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None = None) -> torch.Tensor:
        own = {} if positions_BS is None else {"position_ids": positions_BS}
        out: torch.Tensor = model(input_ids=tokens_BS, use_cache=False, **own).logits
        return out

    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    teacher = Teacher(
        logits,
        config.vocab_size,
        identify(model),
        str(name),
        target,
        positions,
        takes_positions=True,
    )
    check_causal(teacher)
    return teacher


@torch.inference_mode()
def check_causal(teacher: Teacher) -> None:
    """Raise InputError where a later token changes the logits before it, as in an encoder."""
    count = min(CAUSAL_TOKENS, teacher.positions or CAUSAL_TOKENS)
    one = torch.arange(count, device=teacher.device)[None] % teacher.vocab_size
    other = one.clone()
    other[0, -1] = (count + 1) % teacher.vocab_size
    before, after = (teacher.logits(tokens)[:, :-1] for tokens in (one, other))
    rounding = 4 * torch.finfo(before.dtype).eps * before.abs().amax()
    if ((after - before).abs() > rounding).any():
        raise InputError(
            f"teacher {teacher.name!r}: its logits depend on later tokens, expected a causal "
            "language model. Give a decoder, not an encoder."
        )


def identify(model: torch.nn.Module) -> dict[str, str]:
    """Return the class, dtype and content hashes (configuration, weights) of a model."""
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    return {
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "config": digest(canonical(config)),
        "weights": hash_weights(model),
    }
