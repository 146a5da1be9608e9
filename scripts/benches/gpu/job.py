"""What the parts share: device, time left, goals, and a profiler."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benches.common import Record
from ddk_cache.console import say

PACKAGES = (
    *("torch", "transformers", "accelerate", "triton", "liger-kernel", "flash-attn"),
    *("bitsandbytes", "numpy", "zarr"),
)

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations per second, by a word of the device's name."""

SMI = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "pcie.link.gen.current")


@dataclass
class Job:
    """One part at work."""

    record: Record
    device: torch.device
    tiny: bool
    end: float
    """When the time is over, by `time.monotonic`."""
    work: Path
    profile: Path | None = None
    goals: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def time_for(self, what: str) -> bool:
        """Return whether there is time left; where there is none, `what` is noted as left out."""
        left = time.monotonic() < self.end
        if left:
            say(f"{what} …")
        else:
            self.leave_out(f"{what}: the time was over")
        return left

    def leave_out(self, what: str) -> None:
        """Note what was not measured, and why."""
        say(f"not measured: {what}")
        self.left_out.append(what)

    def goal(
        self, name: str, got: float, *, most: float | None = None, least: float | None = None
    ) -> None:
        """Compare a figure with a bound."""
        bound = least if most is None else most
        assert bound is not None
        met = got <= bound if most is not None else got >= bound
        wanted = f"{'at least' if most is None else 'at most'} {bound:.4g}"
        self.goals.append({"goal": name, "wanted": wanted, "got": got, "met": met})

    def conclude(self) -> None:
        """Show the goals; whether they are met means nothing where sizes are tiny."""
        if self.goals:
            words = {True: "yes", False: "no"}
            shown = [
                row | {"met": "tiny" if self.tiny else words[row["met"]]} for row in self.goals
            ]
            self.record.table("goals", shown)

    def profiled(self, name: str, work: Callable[[], object]) -> None:
        """Run `work` once more under the profiler, if that was asked for."""
        if self.profile is None:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            work()
            if self.cuda:
                torch.cuda.synchronize(self.device)
        self.profile.mkdir(parents=True, exist_ok=True)
        path = self.profile / re.sub(r"\W+", "-", name)
        by = "self_cuda_time_total" if self.cuda else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=40)
        path.with_suffix(".txt").write_text(table)
        profile.export_chrome_trace(str(path.with_suffix(".json.gz")))

    def reset_peak(self) -> int:
        """Return the memory in use on a GPU (bytes), from where its peak is now counted."""
        if not self.cuda:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak_mib(self, before: int = 0) -> float:
        """Return the peak since `reset_peak`, above `before` bytes; NaN on a CPU."""
        if not self.cuda:
            return float("nan")
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def device_facts(device: torch.device) -> dict[str, Any]:
    """Return what a reader must know of a device to compare figures."""
    if device.type != "cuda":
        return {"device": str(device), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    words = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            [*words, f"--id={torch.cuda.current_device()}"], capture_output=True, text=True
        )
        values = [part.strip() for part in said.stdout.split(",")]
    except OSError:
        values = []
    return {
        "device": properties.name,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **dict(zip(SMI, values, strict=False)),
    }


def peak_flops(device: torch.device) -> float | None:
    """Return the operations per second of a device in bfloat16, where they are known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for word, flops in PEAK_FLOPS.items() if word in name), None)
