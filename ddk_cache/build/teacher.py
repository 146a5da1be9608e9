"""Token rows → next-token logits: any callable is a teacher.

A teacher is a function with a name, so that the whole pipeline runs on a CPU in seconds with a
function of a few lines in place of a large model. Scoring is pure prefill, so a plain forward pass
in large batches is the whole engine. Language models of transformers are in `ddk_cache.models`,
teachers that need a serving engine in `ddk_cache.served`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ddk_cache.build.targets import Scores, extract
from ddk_cache.errors import InputError
from ddk_cache.format.spec import TargetSpec
from ddk_cache.isolation import check_isolation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Call(NamedTuple):
    """Rows to be scored, and how: the argument of `Teacher.scores`."""

    tokens: torch.Tensor
    """(B, S+1) int64"""
    chosen: torch.Tensor
    """(B) int64, the position of each row whose logits are returned."""
    targets: TargetSpec
    temperatures: tuple[float, ...]
    offsets: torch.Tensor
    """(B, S) float64 in [0, 1), where sampling begins."""
    positions: torch.Tensor | None = None
    """(B, S) int64, where the documents of a row are kept apart."""

    def to(self, device: torch.device) -> Call:
        """Return the call with its tensors on a device."""
        return self._replace(
            tokens=self.tokens.to(device),
            chosen=self.chosen.to(device),
            offsets=self.offsets.to(device),
            positions=None if self.positions is None else self.positions.to(device),
        )


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
    """Rows of one call, where memory is not what decides it."""
    takes_positions: bool = False
    """Whether `logits` takes positions, so that rows may hold documents that are kept apart."""
    position_floats: int | None = None
    """Values that a call holds for a position at one time; by default the V logits."""

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

    def scores(self, call: Call) -> tuple[Scores, torch.Tensor | None]:
        """Return the targets of B rows, and the logits (B, V) of one position of each row.

        A teacher that has no logits returns None instead of them.
        """
        logits = self(call.tokens[:, :-1], call.positions)
        scores = extract(
            logits,
            call.tokens[:, 1:],
            call.targets,
            temperatures=call.temperatures,
            offsets_BS=call.offsets,
        )
        return scores, logits[torch.arange(len(logits), device=logits.device), call.chosen]

    def require_isolation(self) -> None:
        """Raise InputError where the documents of a row would not be kept apart."""
        who = f"teacher {self.name!r}"
        if not self.takes_positions:
            raise InputError(
                f"{who} is a function of tokens alone, so it cannot keep the documents of a row "
                "apart. Give a Teacher with takes_positions, or use --packing stream."
            )
        check_isolation(who, self, self.vocab_size, self.device, self.positions)

    @contextmanager
    def in_step(self) -> Iterator[bool]:
        """Yield whether this process does the job with the teacher, as it does unless others do.

        Of the processes that run one teacher together, the first gets true at once, and the others
        take part in its calls and get false when it is done.
        """
        yield True
