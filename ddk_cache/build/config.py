"""Every setting of a build, its reason and its check.

One flat dataclass, from which the command line makes its options: a setting is described once.
What decides the bytes of a cache becomes a `CacheSpec`, whose checks are the checks here, so a
wrong setting is refused before a teacher is loaded. The price is that a spec is made twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ddk_cache.errors import InputError
from ddk_cache.format.codec import LogprobCodec
from ddk_cache.format.spec import LARGEST, CacheSpec, TargetSpec

CHUNK_TOKENS = 4096
"""Tokens in a chunk, about: enough to compress well, little to read for one row."""

SHARD_TOKENS = 2**18
"""Tokens in a shard, about: the work lost when a build is killed."""

LARGEST_SHARD = 2**28
"""Kept entries in a shard, at most: a shard is scored and written as a whole, in memory."""

WHOLE_NUMBERS = {
    "seq_len": (1, LARGEST["seq_len"]),
    "seed": (0, 2**63 - 1),
    "chunk_rows": (1, LARGEST["chunk_rows"]),
    "shard_rows": (1, LARGEST["shard_rows"]),
    "batch_rows": (1, LARGEST["shard_rows"]),
}
"""Setting → its least and largest value."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What a cache shall hold. Every setting has a default.

    Raises:
        InputError: a setting is out of range or of the wrong type.
    """

    seq_len: int = 1024
    """Positions in a row."""
    targets: str = "sampled:24"
    """Entries kept of each distribution: sampled:B (an unbiased sample, B at most) or topk:K (the K
    likeliest, fewer where they have a mass of 0.9995; topk:K:MASS sets it)."""
    temperatures: tuple[float, ...] = ()
    """Temperature other than 1 at which topk targets can be trained on; repeatable."""
    seed: int = 0
    """Seed for drawing sampled targets."""
    compression: str = "small"
    """small (zstd) takes the fewest bytes, fast (lz4) the least time to read."""
    holdout: float = 0.05
    """Share of documents held out for measuring gaps."""
    learn: str = "assistant"
    """Tokens of a conversation that the loss counts: what the assistant says, its last message
    only, or all."""
    chunk_rows: int | None = None
    """Rows in a chunk, the unit of reading.  [default: 4,096 tokens]"""
    shard_rows: int | None = None
    """Rows in a shard, the unit of work.  [default: 262,144 tokens]"""
    batch_rows: int | None = None
    """Rows in one call to the teacher.  [default: as many as fit in memory]"""

    def __post_init__(self) -> None:
        for name, (least, most) in WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is None and name.endswith("_rows"):
                continue
            if type(value) is not int or not least <= value <= most:
                raise InputError(
                    f"{name}: got {value!r}, expected a whole number from {least} to {most:,}."
                )
        for name in ("targets", "compression", "learn"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name}: got {getattr(self, name)!r}, expected text.")
        if not isinstance(self.temperatures, tuple | list) or not all(
            type(temperature) in (int, float) for temperature in self.temperatures
        ):
            raise InputError(f"temperatures: got {self.temperatures!r}, expected numbers.")
        spec = self.spec(LARGEST["vocab_size"], {}, {})
        entries = spec.shard_rows * spec.seq_len * spec.targets.size
        if entries > LARGEST_SHARD:
            raise InputError(
                f"shard_rows: got {spec.shard_rows:,} rows of {spec.seq_len:,} positions with "
                f"{spec.targets.size} entries, expected at most {LARGEST_SHARD:,} entries in a "
                "shard, which is made in memory. Give fewer --shard-rows."
            )

    def spec(
        self, vocab_size: int, teacher: Mapping[str, str], tokenizer: Mapping[str, str]
    ) -> CacheSpec:
        """Return the spec of a cache over `vocab_size` outputs of a teacher.

        `teacher` and `tokenizer` are their hashes by content.
        """
        targets = TargetSpec.parse(self.targets)
        chunk_rows = self.chunk_rows or max(1, CHUNK_TOKENS // self.seq_len)
        shard_tokens = min(SHARD_TOKENS, LARGEST_SHARD // targets.size)
        chunks = max(1, shard_tokens // self.seq_len // chunk_rows)
        return CacheSpec(
            seq_len=self.seq_len,
            vocab_size=vocab_size,
            targets=targets,
            holdout=self.holdout,
            chunk_rows=chunk_rows,
            shard_rows=self.shard_rows or chunks * chunk_rows,
            logprob_step=LogprobCodec().step,
            teacher=teacher,
            tokenizer=tokenizer,
            temperatures=tuple(sorted({float(t) for t in self.temperatures} - {1.0})),
            seed=self.seed,
            compression=self.compression,
            learn=self.learn,
        )
