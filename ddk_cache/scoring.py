"""The teacher over the rows of a shard, in batches that fit its memory.

The size of a batch decides the last bits of a matrix product, so it is chosen once, tried on the
teacher before the cache begins, and kept with the cache. Should memory run out later all the
same, the batch is halved and said so: a shard in slightly other bits is better than none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ddk_cache import targets
from ddk_cache.console import say
from ddk_cache.schema import Array, CacheError, CacheSpec, ShardKey
from ddk_cache.teacher import Teacher

LOGITS_BYTES = 2**28
"""Logits of one call to the teacher on a CPU; on CUDA a quarter of the free memory."""


@dataclass
class Scorer:
    """A teacher at work on a cache."""

    teacher: Teacher
    spec: CacheSpec
    batch_rows: int

    def score(
        self, key: ShardKey, tokens: Array, advance: Callable[[int], None]
    ) -> dict[str, Array]:
        """Return the scores of (R, S+1) tokens by the name of the array that will hold them.

        Raises:
            CacheError: the teacher raised, whatever it was; named with shard and rows.
        """
        parts: list[targets.Scores] = []
        done = 0
        while done < len(tokens):
            batch = torch.from_numpy(tokens[done : done + self.batch_rows])
            try:
                parts.append(self._call(batch.to(self.teacher.device)))
            except Exception as error:
                if self._halved(error):
                    continue
                rows = f"rows {done}–{done + len(batch) - 1} of {key}"
                raise CacheError(f"the teacher failed on {rows}: {error}") from error
            done += len(batch)
            advance(batch[:, 1:].numel())
        ids, logprobs, tail, label = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        return {
            "target_ids": ids,
            "target_logprobs": logprobs,
            "tail_logprob": tail,
            "label_logprob": label,
        }

    @torch.inference_mode()
    def _call(self, batch: torch.Tensor) -> targets.Scores:
        logits = self.teacher.logits(batch[:, :-1])
        scores = targets.extract(logits, batch[:, 1:], self.spec.targets)
        return targets.Scores(*(field.cpu() for field in scores))

    def _halved(self, error: Exception) -> bool:
        """Halve the batch if memory ran out and there is something to halve."""
        full = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not full or self.batch_rows == 1:
            return False
        self.batch_rows //= 2
        say(f"out of memory: going on with {self.batch_rows} rows in a batch")
        if self.teacher.device.type == "cuda":
            torch.cuda.empty_cache()
        return True


def first_batch(teacher: Teacher, spec: CacheSpec) -> int:
    """Return how many rows to score in one call: by the memory of their logits, and as tried.

    Raises:
        CacheError: the teacher fails on a single row.
    """
    room = LOGITS_BYTES
    if teacher.device.type == "cuda":
        room = torch.cuda.mem_get_info(teacher.device)[0] // 4
    rows = max(1, min(spec.shard_rows, room // (4 * spec.seq_len * spec.vocab_size)))
    scorer = Scorer(teacher, spec, rows)
    tokens = torch.zeros(rows, spec.seq_len + 1, dtype=torch.long).numpy()
    scorer.score(ShardKey("trial", "train", 0), tokens, lambda _: None)
    return scorer.batch_rows
