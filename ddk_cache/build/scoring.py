"""The teacher over the rows of a shard, in batches that fit its memory.

The size of a batch decides the last bits of a matrix product, so it is chosen once, tried on the
teacher before the cache begins, and stored with the cache. If memory runs out later, the batch is
halved with a warning: a shard that differs in the last bits is better than none.

A GPU gets a batch before the host is done with the one before it, and all copies are asynchronous,
from and to pinned memory: the host's work costs the teacher no time. The price is that a failing
GPU is noticed one batch late.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch

from ddk_cache.build import fidelity, targets
from ddk_cache.build.teacher import Call, Teacher
from ddk_cache.errors import CacheError, DDKError
from ddk_cache.format.codec import TargetCodec
from ddk_cache.format.plan import ShardKey
from ddk_cache.format.spec import CacheSpec
from ddk_cache.isolation import positions_of
from ddk_cache.rng import Words, key_of, uniform
from ddk_cache.types import Array

log = logging.getLogger(__name__)

CALL_BYTES = 2**28
"""Memory of one call to the teacher on a CPU; on CUDA a quarter of the free memory."""

COMPARED_BYTES = 2**26
"""Size of the float64 distributions that are compared with their stored form at one time."""


class Scored(NamedTuple):
    """The teacher's output on some rows."""

    arrays: dict[str, Array]
    """`ids` (R, S, K) and log-probabilities, nats: `logprobs` (R, S, K), and each array of the
    cache whose name ends with `_logprob`."""
    fidelity: dict[str, float]
    """What storing it loses, summed over one position of each row; see `fidelity.compare`. Empty
    where the teacher has no logits."""


@dataclass
class Batch:
    """Some rows that the device was given."""

    tokens: Array
    """(B, S+1)"""
    chosen: torch.Tensor
    """(B) the position of each row that is compared with its stored form."""
    scores: targets.Scores
    """In host memory, once the device is done."""
    logits: torch.Tensor | None
    """(B, V) of the chosen positions, on the device; None once compared, or without logits."""
    done: torch.cuda.Event | None
    """None where the device is the host."""

    def wait(self) -> None:
        """Wait until the scores are in host memory."""
        if self.done:
            self.done.synchronize()


@dataclass
class Scorer:
    """A teacher at work on a cache."""

    teacher: Teacher
    spec: CacheSpec
    batch_rows: int
    codec: TargetCodec = field(init=False)

    def __post_init__(self) -> None:
        self.codec = TargetCodec(self.spec)

    def score(
        self,
        key: ShardKey,
        tokens: Array,
        advance: Callable[[int], None],
        segments: Array | None = None,
    ) -> Scored:
        """Return the scores of the (R, S+1) tokens of a shard.

        With `segments` (R, S+1) the teacher sees each document by itself. Where the next token is
        of another document, or padding, it then gets all of the probability: what the teacher
        expects there means nothing, and such a target costs no entry.

        Raises:
            InputError: the teacher returned something other than logits.
            CacheError: the teacher failed, with whatever error; shard and rows are named.
        """
        return self.begin(key, tokens, advance, segments)()

    def begin(
        self,
        key: ShardKey,
        tokens: Array,
        advance: Callable[[int], None],
        segments: Array | None = None,
    ) -> Callable[[], Scored]:
        """Give a shard to the device; return the call that waits for its scores.

        That call may be made by another thread while the next shard begins. Both raise as `score`.
        """
        batches: list[Batch] = []
        lost: list[torch.Tensor] = []
        inside, done = labels_inside(tokens, segments), 0
        while done < len(tokens):
            part = slice(done, done + self.batch_rows)
            rows, apart = tokens[part], None if segments is None else segments[part]
            try:
                batch = self._launch(rows, apart, key, done, inside[part])
            except DDKError:
                raise
            except Exception as error:
                if self._halved(error):
                    continue
                where = f"rows {done}–{done + len(rows) - 1} of {key}"
                raise CacheError(f"the teacher failed on {where}: {error}") from error
            if batches:
                lost += self._compare(batches[-1])
            batches.append(batch)
            done += len(rows)
            advance(rows[:, 1:].size)
        return partial(self._finish, key, batches, lost, inside)

    def _finish(
        self, key: ShardKey, batches: list[Batch], lost: list[torch.Tensor], inside: Array
    ) -> Scored:
        try:
            lost += self._compare(batches[-1])
            arrays = as_arrays([batch.scores for batch in batches])
            figures = torch.stack(lost).tolist() if lost else []
        except RuntimeError as error:
            raise CacheError(f"the teacher failed on {key}: {error}") from error
        tokens = np.concatenate([batch.tokens for batch in batches])
        make_certain(arrays, tokens[:, 1:], ~inside)
        sums = map(sum, zip(*figures, strict=True))
        return Scored(arrays, dict(zip(fidelity.FIGURES, sums, strict=bool(lost))))

    @torch.inference_mode()
    def _launch(
        self, tokens: Array, segments: Array | None, key: ShardKey, first: int, inside: Array
    ) -> Batch:
        """Give rows first … of a shard to the device, without waiting for it."""
        device = self.teacher.device
        offsets, chosen = draws(self.spec, key, first, inside)
        positions = None
        if segments is not None:
            positions = to_device(positions_of(torch.from_numpy(segments[:, :-1])), device)
        call = Call(
            to_device(torch.from_numpy(tokens), device),
            to_device(chosen, device),
            self.spec.targets,
            self.spec.temperatures,
            to_device(torch.from_numpy(offsets), device),
            positions,
        )
        scores, logits = self.teacher.scores(call)
        scores = targets.Scores(*(field.to("cpu", non_blocking=True) for field in scores))
        copied = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        if copied:
            copied.record(torch.cuda.current_stream(device))
        return Batch(tokens, chosen, scores, logits, copied)

    @torch.inference_mode()
    def _compare(self, batch: Batch) -> list[torch.Tensor]:
        """Return the sums of `fidelity.compare` over one position of each row, if it has logits."""
        batch.wait()
        logits, batch.logits = batch.logits, None
        if logits is None:
            return []
        rows, chosen = torch.arange(len(batch.tokens)), batch.chosen
        at = targets.Scores(*(field[rows, chosen][:, None] for field in batch.scores))
        tokens = batch.tokens[rows[:, None], torch.stack([chosen, chosen + 1], -1)]
        encoded = self.codec.encode(as_arrays([at]), tokens[:, 1:])
        device, kept = logits.device, self.codec.targets(encoded | {"tokens": tokens})
        stored = kept.map(lambda part: to_device(torch.from_numpy(part[:, 0]), device))
        sampled = self.spec.targets.kind == "sampled"
        parts = rows.split(max(1, COMPARED_BYTES // (8 * self.spec.vocab_size)))
        return [
            fidelity.compare(logits[part], stored.map(itemgetter(part)), sampled=sampled)
            for part in parts
        ]

    def _halved(self, error: Exception) -> bool:
        """Halve the batch if memory ran out and there is something to halve."""
        full = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not full or self.batch_rows == 1:
            return False
        self.batch_rows //= 2
        log.warning("out of memory: rows in a batch are now %d", self.batch_rows)
        if self.teacher.device.type == "cuda":
            torch.cuda.empty_cache()
        return True


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device, without waiting for what the device does."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def as_arrays(parts: list[targets.Scores]) -> dict[str, Array]:
    """Return the scores of several batches of rows by name, with axes as they are stored."""
    fields = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    arrays: dict[str, Array] = dict(zip(targets.Scores._fields, fields, strict=True))
    tempered = arrays["tempered_tail_logprob"]
    return arrays | {"tempered_tail_logprob": np.moveaxis(tempered, -1, 1)}


def labels_inside(tokens: Array, segments: Array | None) -> Array:
    """Return (R, S) bool: whether the next token is of the same document.

    Without segments it always is, and of the (R, S+1) tokens only the shape is used.
    """
    if segments is None:
        return np.ones(tokens[:, 1:].shape, bool)
    return np.asarray((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0))


def make_certain(arrays: dict[str, Array], labels: Array, where: Array) -> None:
    """Give all of the probability to the (R, S) true tokens at some positions, in place."""
    ids, logprobs = arrays["ids"], arrays["logprobs"]
    ids[where], logprobs[where] = -1, -np.inf
    ids[where, 0], logprobs[where, 0] = labels[where], 0
    arrays["tail_logprob"][where], arrays["label_logprob"][where] = -np.inf, 0
    np.moveaxis(arrays["tempered_tail_logprob"], 1, -1)[where] = -np.inf


def draws(spec: CacheSpec, key: ShardKey, first: int, inside: Array) -> tuple[Array, torch.Tensor]:
    """Return (R, S) numbers in [0, 1) that decide draws, and the (R) positions to be compared.

    Both belong to rows first … of a shard, and are functions of seed, domain, split, row and
    position. A position that is compared has a label of its document; see `labels_inside`.
    """
    rows, S = inside.shape
    start = key.number * spec.shard_rows + first
    numbers: Words = np.arange(start, start + rows, dtype=np.uint64)
    places = numbers[:, None] * np.uint64(S) + np.arange(S, dtype=np.uint64)
    offsets = uniform(places.astype(np.uint64), key_of("draw", spec.seed, key.domain, key.split))
    chosen = uniform(numbers, key_of("compare", key.domain, key.split))
    upto = inside.cumsum(1)
    nth = (chosen * upto[:, -1]).astype(np.int64)
    return offsets, torch.from_numpy((upto > nth[:, None]).argmax(1))


def rows_that_fit(teacher: Teacher, spec: CacheSpec) -> int:
    """Return how many rows to score in one call, by the memory that it takes.

    That is the logits, or the hidden states within a teacher whose logits are made in chunks.
    """
    if teacher.batch_rows:
        return min(spec.shard_rows, teacher.batch_rows)
    room = CALL_BYTES
    if teacher.device.type == "cuda":
        room = torch.cuda.mem_get_info(teacher.device)[0] // 4
    row_bytes = 4 * spec.seq_len * (teacher.position_floats or spec.vocab_size)
    return max(1, min(spec.shard_rows, room // row_bytes))
