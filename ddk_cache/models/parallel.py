"""One teacher in several processes of torchrun, each with a part of every layer.

A job runs in the first process alone: it leases, writes and reports as in any build. The others
repeat each call to the teacher with the same arguments, so that all meet in the same sums, and the
extraction from logits, which every process does, needs no message of its own. The price is that a
process which fails ends the job: no batch is halved where memory runs out, since the processes
would no longer agree on the calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta

import torch
import torch.distributed as dist

from ddk_cache.build.targets import Scores
from ddk_cache.build.teacher import Call, Teacher
from ddk_cache.errors import CacheError, InputError

PATIENCE = timedelta(days=30)
"""How long a process waits for the next call: planning a large corpus takes hours."""


def require_world(size: int) -> None:
    """Raise InputError unless torchrun started `size` processes."""
    started = os.environ.get("WORLD_SIZE", "1")
    if started != str(size):
        raise InputError(
            f"tensor_parallel: got {size} in a job of {started} processes, expected as many "
            "processes as parts. Start it with  "
            f"torchrun --nproc-per-node {size} --no-python ddk-cache …"
        )


class Channel:
    """Carries calls from the first process of a job to the others."""

    def __init__(self) -> None:
        """Connect all processes; all must do it."""
        self.first = dist.get_rank() == 0
        self.in_call = False
        """Whether the others are in a call, so that none of them listens."""
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def send(self, call: Call | None) -> None:
        """Send a call, its tensors on the CPU, or None where there will be no other."""
        dist.broadcast_object_list([call], src=0, group=self._group)

    def receive(self) -> Call | None:
        """Wait for the next call."""
        box: list[Call | None] = [None]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def in_parallel(teacher: Teacher) -> ParallelTeacher:
    """Return a teacher whose calls all processes make together."""
    shared = {field.name: getattr(teacher, field.name) for field in fields(Teacher)}
    joins = None
    try:
        teacher.require_isolation()  # a call that all make, so now and not when a job asks
    except InputError as error:
        joins = error
    return ParallelTeacher(**shared, part=teacher, channel=Channel(), joins=joins)


@dataclass(frozen=True, kw_only=True)
class ParallelTeacher(Teacher):
    """A teacher that the first process of a job calls and the others follow."""

    part: Teacher
    """The teacher of this process, which meets the others in every call."""
    channel: Channel
    joins: InputError | None
    """Why the documents of a row would not be kept apart, if so."""

    def require_isolation(self) -> None:
        """Raise InputError where the documents of a row would not be kept apart."""
        if self.joins:
            raise self.joins

    def scores(self, call: Call) -> tuple[Scores, torch.Tensor | None]:
        """Return the targets of B rows, and the logits (B, V) of one position of each row.

        Raises:
            InputError: it is not the first process that calls.
            CacheError: a process failed.
        """
        if not self.channel.first:
            raise InputError(
                "tensor_parallel: got a call of another process than the first, expected a job "
                "in 'with teacher.in_step() as first'. Do it only where first is true."
            )
        self.channel.send(call.to(torch.device("cpu")))
        self.channel.in_call = True
        try:
            scores = self.part.scores(call.to(self.device))
        except Exception as error:
            raise CacheError(
                f"the teacher failed in one of its processes: {error}. If memory ran out, give a "
                "smaller --batch-rows."
            ) from error
        self.channel.in_call = False
        return scores

    @contextmanager
    def in_step(self) -> Iterator[bool]:
        """Yield true in the first process; in the others false, once its job is done."""
        if not self.channel.first:
            self._follow()
            dist.destroy_process_group()
            yield False
            return
        try:
            yield True
        finally:
            if not self.channel.in_call:
                self.channel.send(None)
                dist.destroy_process_group()

    @torch.inference_mode()
    def _follow(self) -> None:
        """Make the calls of the first process, until there will be no other."""
        while call := self.channel.receive():
            self.part.scores(call.to(self.device))
