"""The teacher over the rows of a shard, in batches that fit its memory.

The size of a batch decides the last bits of a matrix product, so it is chosen once, tried on the
teacher before the cache begins, and stored with the cache. If memory runs out later, the batch is
halved with a warning: a shard that differs in the last bits is better than none.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch

from ddk_cache.build import fidelity, targets
from ddk_cache.build.teacher import Teacher
from ddk_cache.errors import CacheError, DDKError
from ddk_cache.format.codec import TargetCodec
from ddk_cache.format.plan import ShardKey
from ddk_cache.format.spec import CacheSpec
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
class Scorer:
    """A teacher at work on a cache."""

    teacher: Teacher
    spec: CacheSpec
    batch_rows: int
    codec: TargetCodec = field(init=False)

    def __post_init__(self) -> None:
        self.codec = TargetCodec(self.spec)

    def score(self, key: ShardKey, tokens: Array, advance: Callable[[int], None]) -> Scored:
        """Return the scores of the (R, S+1) tokens of a shard.

        Raises:
            InputError: the teacher returned something other than logits.
            CacheError: the teacher failed, with whatever error; shard and rows are named.
        """
        parts: list[targets.Scores] = []
        lost: Counter[str] = Counter()
        done = 0
        while done < len(tokens):
            batch = torch.from_numpy(tokens[done : done + self.batch_rows])
            try:
                scores, seen = self._call(batch.to(self.teacher.device), key, done)
            except DDKError:
                raise
            except Exception as error:
                if self._halved(error):
                    continue
                rows = f"rows {done}–{done + len(batch) - 1} of {key}"
                raise CacheError(f"the teacher failed on {rows}: {error}") from error
            parts.append(scores)
            lost.update(seen)
            done += len(batch)
            advance(batch[:, 1:].numel())
        return Scored(as_arrays(parts), dict(lost))

    @torch.inference_mode()
    def _call(
        self, batch: torch.Tensor, key: ShardKey, first: int
    ) -> tuple[targets.Scores, dict[str, float]]:
        """Score rows first … of a shard; compare one position of each with its stored form."""
        offsets, chosen = draws(self.spec, key, first, len(batch))
        scores, logits = self.teacher.scores(
            batch,
            chosen,
            self.spec.targets,
            temperatures=self.spec.temperatures,
            offsets_BS=torch.from_numpy(offsets).to(batch.device),
        )
        scores = targets.Scores(*(field.cpu() for field in scores))
        if logits is None:
            return scores, {}
        rows = torch.arange(len(batch))
        at = targets.Scores(*(field[rows, chosen][:, None] for field in scores))
        tokens = batch.cpu()[rows[:, None], torch.stack([chosen, chosen + 1], -1)].numpy()
        encoded = self.codec.encode(as_arrays([at]), tokens[:, 1:])
        device, kept = logits.device, self.codec.targets(encoded | {"tokens": tokens})
        stored = kept.map(lambda part: torch.from_numpy(part[:, 0]).to(device))
        sampled = self.spec.targets.kind == "sampled"
        lost: Counter[str] = Counter()
        for some in rows.split(max(1, COMPARED_BYTES // (8 * self.spec.vocab_size))):
            part = stored.map(itemgetter(some))
            lost.update(fidelity.compare(logits[some], part, sampled=sampled))
        return scores, dict(lost)

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


def as_arrays(parts: list[targets.Scores]) -> dict[str, Array]:
    """Return the scores of several batches of rows by name, with axes as they are stored."""
    fields = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    arrays: dict[str, Array] = dict(zip(targets.Scores._fields, fields, strict=True))
    tempered = arrays["tempered_tail_logprob"]
    return arrays | {"tempered_tail_logprob": np.moveaxis(tempered, -1, 1)}


def draws(spec: CacheSpec, key: ShardKey, first: int, rows: int) -> tuple[Array, torch.Tensor]:
    """Return (R, S) numbers in [0, 1) that decide draws, and the (R) positions to be compared.

    Both belong to rows first … of a shard, and are functions of seed, domain, split, row and
    position.
    """
    S = spec.seq_len
    start = key.number * spec.shard_rows + first
    numbers: Words = np.arange(start, start + rows, dtype=np.uint64)
    places = numbers[:, None] * np.uint64(S) + np.arange(S, dtype=np.uint64)
    offsets = uniform(places.astype(np.uint64), key_of("draw", spec.seed, key.domain, key.split))
    chosen = uniform(numbers, key_of("compare", key.domain, key.split))
    return offsets, torch.from_numpy((chosen * S).astype(np.int64))


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
