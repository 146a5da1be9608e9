"""What a resumed run needs, in a directory: student, optimizer, random states, and the state.

Everything is stored at full precision, so that a resumed run continues with the same bits; the
price is three times the size of the float32 student on disk. The directory appears whole or not at
all (`Run.checkpoint`). One that was damaged later is named and set aside, and the run resumes from
the one before it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ddk_cache import Cache, DDKError
from ddk_train.distributed import Processes
from ddk_train.evaluate import GapMeter
from ddk_train.provenance import IDENTITY, check_identity
from ddk_train.run.directory import Run
from ddk_train.student.load import load_weights
from ddk_train.weights.moving import DomainWeights

log = logging.getLogger(__name__)

DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError),
    *(SafetensorError, pickle.UnpicklingError),
)
"""Errors of reading a file of a checkpoint that is missing, cut short or overwritten."""


@dataclass
class State:
    """What changes during a run besides the student, the optimizer and the domain weights."""

    domains: list[str]
    mixture: dict[str, Any]
    pairs: dict[str, Any] = field(default_factory=dict)
    """State of the order of the pairs, where there are any."""
    seen: dict[str, int] = field(default_factory=dict)
    """Rows drawn so far, by domain."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Counted positions trained on so far, by domain."""
    step: int = 0
    seconds: float = 0.0
    """Time of training, without measurements."""
    eval_seconds: float = 0.0
    """Time of measurements."""
    measured: int = -1
    """Step of the last measurement."""
    best: int = 0
    """Step of the measurement with the lowest mean held-out loss."""
    best_loss: float | None = None
    lowest: dict[str, float] = field(default_factory=dict)
    """Lowest held-out loss so far, by domain."""
    unseen_sums: dict[str, list[float]] = field(default_factory=dict)
    """By domain, over the unseen rows since the last measurement: the sums of the student's and of
    the teacher's loss, nats, and of positions. An unseen row is a training row of the first epoch,
    at the step that draws it."""
    unseen_loss: dict[str, list[float]] = field(default_factory=dict)
    """By domain, the mean losses of student and teacher on the unseen rows before the latest
    measurement that had any; nats per position."""

    def __post_init__(self) -> None:
        self.seen = self.seen or dict.fromkeys(self.domains, 0)
        self.tokens = self.tokens or dict.fromkeys(self.domains, 0)

    def note_losses(self, measured: Mapping[str, float], trained: Sequence[str]) -> None:
        """Note the lowest of the held-out losses, by domain, and of their mean over `trained`."""
        losses = [loss for name, loss in measured.items() if name in trained]
        mean = sum(losses) / max(1, len(losses))
        if losses and (self.best_loss is None or mean < self.best_loss):
            self.best, self.best_loss = self.step, mean
        for name, loss in measured.items():
            self.lowest[name] = min(loss, self.lowest.get(name, loss))

    def add_unseen(self, domain: str, sums: Sequence[float]) -> None:
        """Add the losses of student and teacher on unseen rows, and the number of positions."""
        had = self.unseen_sums.get(domain, [0.0, 0.0, 0.0])
        self.unseen_sums[domain] = [was + more for was, more in zip(had, sums, strict=True)]

    def settle_unseen(self) -> None:
        """Turn the sums on unseen rows into means, at a measurement."""
        for name, (*losses, positions) in self.unseen_sums.items():
            self.unseen_loss[name] = [loss / positions for loss in losses]
        self.unseen_sums = {}

    def over(self, domains: list[str]) -> State:
        """Return the state for the domains of a cache that may have grown."""
        seen, tokens = (
            {name: had.get(name, 0) for name in domains} for had in (self.seen, self.tokens)
        )
        return dataclasses.replace(self, domains=domains, seen=seen, tokens=tokens)


@dataclass(frozen=True)
class Trained:
    """The parts of a run that a checkpoint stores and restores in place."""

    student: Any
    optimizer: torch.optim.Optimizer
    weights: DomainWeights
    meter: GapMeter
    processes: Processes


def save(
    path: Path, state: State, parts: Trained, randoms: list[object], identity: dict[str, Any]
) -> None:
    """Write a checkpoint into an empty directory; `randoms` are the random states by process."""
    parts.student.save_pretrained(path / "student")
    held = {"optimizer": parts.optimizer.state_dict(), "random": randoms}
    held["measured"] = parts.meter.state_dict()
    torch.save(held, path / "torch.pt")
    values = asdict(state) | {"weights": parts.weights.state_dict()}
    (path / "state.json").write_text(json.dumps(values, indent=1))
    (path / IDENTITY).write_text(json.dumps(identity, indent=1))


def load(path: Path, parts: Trained) -> State:
    """Restore the parts from a checkpoint and return its state. Raises one of `DAMAGE`."""
    values = json.loads((path / "state.json").read_text())
    weights, state = values.pop("weights"), State(**values)
    held = torch.load(path / "torch.pt", map_location="cpu", weights_only=True)
    randoms, processes = held["random"], parts.processes
    load_weights(parts.student, path / "student")
    parts.optimizer.load_state_dict(held["optimizer"])
    parts.weights.load_state_dict(weights)
    parts.meter.load_state_dict(held["measured"])
    if len(randoms) == processes.world:
        set_random(randoms[processes.rank], processes.device)
    else:
        log.warning(
            f"resumed in {processes.world} process(es) instead of {len(randoms)}: random numbers, "
            "such as those of dropout, differ from those of an uninterrupted run"
        )
    return state


def load_last(run: Run, cache: Cache, parts: Trained) -> State | None:
    """Restore the parts from the last checkpoint that is not damaged; None where none was written.

    Raises:
        MismatchError: the checkpoint was trained from another cache.
        DDKError: all checkpoints are damaged.
    """
    broken: list[Path] = []
    for _, path in reversed(run.checkpoints()):
        try:
            check_identity(path, cache)
            return load(path, parts)
        except torch.OutOfMemoryError:
            raise
        except DAMAGE as error:
            log.warning(f"the checkpoint {path} is damaged: {error}")
            broken.append(run.set_aside(path) if parts.processes.main else path)
    if broken:
        raise DDKError(
            f"no checkpoint of {run.path} can be read; they are now named "
            f"{', '.join(path.name for path in broken)}. Run the same command again to start anew, "
            "or restore one."
        )
    return None


def get_random(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set the states that `get_random` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
