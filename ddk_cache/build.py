"""The job: open or create → plan → teacher → write → commit, shard by shard.

While the teacher works on a shard, the one before it is compressed, flushed and committed by a
thread; at most one shard waits, so memory is bounded and at most two shards of work are lost when
the process dies. The same call goes on where the last one stopped.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddk_cache import files, targets
from ddk_cache.codec import LogprobCodec
from ddk_cache.console import Progress, say
from ddk_cache.corpus import Source
from ddk_cache.manifest import TOKENIZER, Manifest, committed
from ddk_cache.plan import plan_all
from ddk_cache.pretrained import identify_tokenizer
from ddk_cache.schema import (
    Array,
    CacheError,
    CacheSpec,
    DDKError,
    InputError,
    MismatchError,
    NotACacheError,
    ShardKey,
    TargetSpec,
    shards,
)
from ddk_cache.store import Store
from ddk_cache.teacher import Teacher

CHUNK_TOKENS = 4096
"""Tokens in a chunk, about: enough to compress well, little to read for one row."""

SHARD_TOKENS = 2**18
"""Tokens in a shard, about: the work lost when a build is killed."""

LOGITS_BYTES = 2**29
"""Logits of one call to the teacher on a CPU; on CUDA a quarter of the free memory."""


def build(
    cache: str | Path,
    sources: list[Source],
    teacher: Teacher,
    tokenizer: Any,
    *,
    seq_len: int = 1024,
    target_spec: str = "topk:64",
    holdout: float = 0.05,
    batch_rows: int | None = None,
    chunk_rows: int | None = None,
    shard_rows: int | None = None,
) -> None:
    """Build a cache, or go on with one that was stopped.

    Raises:
        InputError: a setting is out of range, or the path holds something else.
        MismatchError: the cache was begun with other settings; each is named.
        CacheError: the teacher gave something that is no distribution.
    """
    root = Path(cache)
    chunk_rows = chunk_rows or max(1, CHUNK_TOKENS // seq_len)
    spec = CacheSpec(
        seq_len=seq_len,
        vocab_size=teacher.vocab_size,
        targets=TargetSpec.parse(target_spec),
        holdout=holdout,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows or max(1, SHARD_TOKENS // seq_len // chunk_rows) * chunk_rows,
        logprob_step=LogprobCodec().step,
        teacher=teacher.identity,
        tokenizer=identify_tokenizer(tokenizer),
    )
    if len(tokenizer) > teacher.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer):,} tokens and the teacher only "
            f"{teacher.vocab_size:,} outputs: they do not belong together."
        )
    manifest = _open(root, spec, sources, teacher, tokenizer, batch_rows)
    store = Store(root, spec)
    store.sweep()
    with Progress("planning", 0, "tokens") as progress:
        manifest = plan_all(store, manifest, sources, tokenizer, progress)
    _score_all(store, manifest, teacher)


def _open(
    root: Path,
    spec: CacheSpec,
    sources: list[Source],
    teacher: Teacher,
    tokenizer: Any,
    batch_rows: int | None,
) -> Manifest:
    """Return the manifest of the cache at `root`, which is created where there is none."""
    described = {source.name: source.describe() for source in sources}
    try:
        manifest = Manifest.read(root)
    except NotACacheError:
        if root.exists() and not (
            root.is_dir() and {p.name for p in root.iterdir()} <= {TOKENIZER}
        ):
            raise InputError(f"{root} exists and is not a cache. Give another path.") from None
        manifest = Manifest(
            spec=spec,
            batch_rows=batch_rows or _first_batch(teacher, spec),
            sources=described,
            plans={},
            provenance={
                "teacher": teacher.name,
                "tokenizer": str(tokenizer.name_or_path),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
        )
        root.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(root / TOKENIZER)
        files.sync_tree(root / TOKENIZER)
        manifest.write(root)
        return manifest
    compare(root, manifest.spec.to_json(), spec.to_json())
    compare(root, dict(manifest.sources), described)
    return manifest


def compare(root: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise MismatchError naming every setting in which a build differs from its cache."""
    differences = [
        f"  {name}: the cache has {was.get(name)}, this build asks for {now.get(name)}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]
    if differences:
        raise MismatchError(
            f"{root} was begun with other settings:\n"
            + "\n".join(differences)
            + "\nUse another path, or the original values."
        )


# --- the teacher ----------------------------------------------------------------------------------


def _first_batch(teacher: Teacher, spec: CacheSpec) -> int:
    """Return how many rows to try in one call, by the memory that their logits need."""
    room = LOGITS_BYTES
    if teacher.device.type == "cuda":
        room = torch.cuda.mem_get_info(teacher.device)[0] // 4
    return max(1, min(spec.shard_rows, room // (4 * spec.seq_len * spec.vocab_size)))


@dataclass
class Scorer:
    """The teacher over the rows of a shard, in batches that fit its memory."""

    teacher: Teacher
    spec: CacheSpec
    batch_rows: int

    @torch.inference_mode()
    def score(self, tokens: Array, advance: Callable[[int], None]) -> targets.Scores:
        """Return the scores of (R, S+1) tokens, on the host."""
        parts: list[targets.Scores] = []
        done = 0
        while done < len(tokens):
            batch = torch.from_numpy(tokens[done : done + self.batch_rows]).to(
                self.teacher.device, torch.long
            )
            try:
                logits = self.teacher.logits(batch[:, :-1])
                scores = targets.extract(logits, batch[:, 1:], self.spec.targets)
            except RuntimeError as error:
                self._halve(error)
                continue
            parts.append(targets.Scores(*(field.cpu() for field in scores)))
            done += len(batch)
            advance(batch[:, 1:].numel())
        return targets.Scores(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _halve(self, error: RuntimeError) -> None:
        """Go on with half the batch after an out-of-memory error; raise any other."""
        full = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not full or self.batch_rows == 1:
            raise error
        self.batch_rows //= 2
        say(f"out of memory: going on with {self.batch_rows} rows in a batch")
        if self.teacher.device.type == "cuda":
            torch.cuda.empty_cache()


def audit(scores: targets.Scores, key: ShardKey, first_row: int = 0) -> None:
    """Raise CacheError where a score is no finite log-probability (a tail may be −inf)."""
    bad = ~(scores.logprobs.isfinite().all(-1) & scores.label.isfinite())
    bad |= scores.tail.isnan() | (scores.tail > 1e-4) | (scores.logprobs > 1e-4).any(-1)
    if bad.any():
        rows = bad.any(-1).nonzero()[:, 0] + first_row
        raise CacheError(
            f"the teacher's output is no distribution at {int(bad.sum()):,} positions of "
            f"{key} (rows {int(rows[0])}–{int(rows[-1])} of the shard). Nothing of it was "
            "committed. A wider dtype (--dtype float32) may help."
        )


# --- shards ---------------------------------------------------------------------------------------


def _score_all(store: Store, manifest: Manifest, teacher: Teacher) -> None:
    """Score and commit every shard that is not committed yet."""
    spec = store.spec
    rows = {
        key: shards(manifest.plans[key.domain], key.split, spec.shard_rows)[key.number]
        for key in manifest.shards()
    }
    done = {pair: committed(store.root, *pair) for pair in {key[:2] for key in rows}}
    todo = [key for key in rows if key.number not in done[key[:2]]]
    scorer = Scorer(teacher, spec, manifest.batch_rows)
    total = sum(rows[key] for key in todo) * spec.seq_len
    with Progress("scoring", total, "tokens") as progress, ThreadPoolExecutor(1) as writer:
        pending: Future[None] | None = None
        try:
            for key in todo:
                tokens = store.read(key, "tokens", rows[key]).astype(np.int64)
                note = f"{key.domain}/{key.split}"
                scores = scorer.score(tokens, partial(progress.advance, note=note))
                audit(scores, key)
                if pending:
                    pending.result()
                pending = writer.submit(_finish, store, key, rows[key], scores)
            if pending:
                pending.result()
        except KeyboardInterrupt:
            raise _stopped(store, manifest) from None
    if scorer.batch_rows != manifest.batch_rows:
        dataclasses.replace(manifest, batch_rows=scorer.batch_rows).write(store.root)


def _stopped(store: Store, manifest: Manifest) -> DDKError:
    keys = manifest.shards()
    done = sum(len(committed(store.root, *pair)) for pair in {key[:2] for key in keys})
    return DDKError(
        f"stopped: {done} of {len(keys)} shards of {store.root} are committed. Run the same "
        "command again to go on."
    )


def _finish(store: Store, key: ShardKey, rows: int, scores: targets.Scores) -> None:
    """Encode, write and commit one shard."""
    mask = store.read(key, "loss_mask", rows).astype(bool)
    loss = -scores.label.double().numpy()[mask]
    encode = store.codec.encode
    store.write(
        key,
        {
            "target_ids": scores.ids.numpy(),
            "target_logprobs": encode(scores.logprobs.numpy()),
            "tail_logprob": encode(scores.tail.numpy()),
            "label_logprob": encode(scores.label.numpy()),
        },
    )
    store.commit(key, rows=rows, positions=int(mask.sum()), teacher_loss=float(loss.sum()))
