"""What a resumed run needs, in a directory: student, optimizer, random states, and the state.

Everything is written as it is, so that a resumed run continues with the same bits; the price is
three times the student's size on disk. The directory appears whole or not at all (`Run`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddk_train.data.mixture import Floats
from ddk_train.distributed import Processes
from ddk_train.provenance import IDENTITY
from ddk_train.student import load_weights

log = logging.getLogger(__name__)


@dataclass
class State:
    """What changes during a run beside weights and optimizer; plain JSON in a checkpoint."""

    domains: list[str]
    mixture: dict[str, Any]
    seen: dict[str, int] = field(default_factory=dict)
    """Rows drawn of each domain."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Counted positions trained on of each domain."""
    step: int = 0
    seconds: float = 0.0
    eval_seconds: float = 0.0
    """Spent on measuring gaps, which `seconds` leaves out."""
    measured: int = -1
    """Step of the last measurement."""
    best: int = 0
    """Step of the measurement with the lowest mean held-out loss."""
    best_loss: float | None = None
    lowest: dict[str, float] = field(default_factory=dict)
    """Lowest held-out loss of each domain so far."""
    log_factor: list[str] | None = None
    """(D) log r of the weighting rule, exact hexadecimal floats."""
    weights: list[str] = field(default_factory=list)
    """(D) sampling weights in force, likewise."""

    def __post_init__(self) -> None:
        self.seen = self.seen or dict.fromkeys(self.domains, 0)
        self.tokens = self.tokens or dict.fromkeys(self.domains, 0)

    def over(self, domains: list[str]) -> State:
        """Return the state of a run whose cache grew by domains: it will measure at once."""
        if self.domains == domains:
            return self
        seen, tokens = (
            {name: had.get(name, 0) for name in domains} for had in (self.seen, self.tokens)
        )
        return dataclasses.replace(
            self, domains=domains, seen=seen, tokens=tokens, log_factor=None, weights=[]
        )


def exact(values: Floats) -> list[str]:
    """Return floats as text that gives the same bits back."""
    return [float(value).hex() for value in values]


def floats(texts: list[str]) -> Floats:
    """Read what `exact` wrote."""
    return np.array([float.fromhex(text) for text in texts])


def save(
    path: Path,
    state: State,
    student: Any,
    optimizer: torch.optim.Optimizer,
    randoms: list[object],
    identity: dict[str, Any],
) -> None:
    """Write a checkpoint into an empty directory; `randoms` are the states by process."""
    student.save_pretrained(path / "student")
    torch.save({"optimizer": optimizer.state_dict(), "random": randoms}, path / "torch.pt")
    (path / "state.json").write_text(json.dumps(asdict(state), indent=1))
    (path / IDENTITY).write_text(json.dumps(identity, indent=1))


def load(path: Path, student: Any, optimizer: torch.optim.Optimizer, processes: Processes) -> State:
    """Take everything from a checkpoint and return its state."""
    load_weights(student, path / "student")
    held = torch.load(path / "torch.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(held["optimizer"])
    if len(held["random"]) == processes.world:
        set_random(held["random"][processes.rank], processes.device)
    else:
        log.warning(
            "the number of processes is another now: random numbers such as dropout begin anew"
        )
    return State(**json.loads((path / "state.json").read_text()))


def get_random(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set what `get_random` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
