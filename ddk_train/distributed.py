"""Where a run computes: one process, or as many as a launcher started, and its trackers.

Accelerate connects the processes, wraps the module and writes to the trackers. A single process
chooses its device here: accelerate keeps its choice for the whole life of a process, and a second
run in the same process could not have another.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import TYPE_CHECKING

import torch

from ddk_cache import InputError
from ddk_cache.errors import unknown
from ddk_cache.hf import pick_device

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ddk_train.config import TrainConfig


SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What `accelerate launch` sets → how it then shards the weights of a model."""


class Processes:
    """The processes of a run; each takes its part of the rows of every step."""

    def __init__(self, config: TrainConfig) -> None:
        """Connect the processes that `torchrun` or `accelerate launch` started, if any.

        Raises:
            InputError: the device is missing, the launcher shards the weights, or the rows of a
                step cannot be shared evenly.
        """
        from accelerate import Accelerator

        check_whole_weights()
        world = launched()
        device = pick_device(config.device)
        self.accelerator: Accelerator = Accelerator(
            cpu=world == 1 or device.type == "cpu",
            mixed_precision="no",
            device_placement=False,
            log_with=check_trackers(config.report_to) or None,
            project_dir=config.run,
        )
        self.device = device if world == 1 else self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        if self.world != world:
            raise InputError(
                f"WORLD_SIZE: got {world} processes, of which accelerate connected {self.world}. "
                "Start the run in a process of its own."
            )
        if config.rows % self.world:
            raise InputError(
                f"{config.rows} rows per step cannot be shared evenly by {self.world} processes. "
                f"Give --rows a multiple of {self.world}."
            )
        self.share = slice(self.rank, None, self.world)
        """Which rows of a step belong to this process."""

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes."""
        return self.accelerator.reduce(value, "sum") if self.world > 1 else value

    def each(self, value: object) -> list[object]:
        """Return the values of all processes, by rank."""
        from accelerate.utils import gather_object

        gathered: list[object] = gather_object([value])
        return gathered

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def open_trackers(self, config: TrainConfig) -> None:
        """Start the trackers of `--report-to`, on the process that writes."""
        if config.report_to:
            self.accelerator.init_trackers("ddk", config.to_json())


def check_whole_weights() -> None:
    """Raise InputError where `accelerate launch` was told to shard the weights of the model."""
    for name, what in SHARDED.items():
        if os.environ.get(name, "false").lower() in ("1", "true", "yes", "on"):
            raise InputError(
                f"{what} is not supported: the loss is computed from the whole weights of the "
                "output projection, and checkpoints hold whole weights. Launch plain data "
                "parallelism (accelerate launch --multi_gpu); --gradient-checkpointing, "
                "--optimizer adamw_8bit and --lora-rank save memory."
            )


def launched() -> int:
    """Return how many processes the launcher started. Raises InputError on a damaged WORLD_SIZE."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(
            f"WORLD_SIZE: got {text!r}, expected a number of processes. Unset it, or start the "
            "run with `accelerate launch -m ddk_train` or torchrun."
        )
    return int(text)


def check_trackers(names: str) -> list[str]:
    """Return the trackers of a comma-separated list.

    Raises:
        InputError: one is not known, or not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    chosen = [name.strip() for name in names.split(",") if name.strip()]
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    here = {str(tracker) for tracker in get_available_trackers()}
    for name in chosen:
        if name not in known:
            raise InputError(unknown("tracker", name, known))
        if name not in here:
            raise InputError(
                f"tracker {name!r} is not installed. Install its package, or use one of: "
                f"{', '.join(sorted(here)) or 'none here'}. metrics.jsonl is written in any case."
            )
    return chosen


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: of the GPU, or else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
