"""Caches to measure reading with: built from synthetic text and logits, then multiplied.

The teacher is two small random matrices, scaled so that its entropy is that of a language model
on text (two to three nats); it costs seconds. The build is the real one, so whatever a cache holds
is stored as it always is. Multiplying repeats its shards under new numbers, each with a record of
its own: as copies if bytes must be read from the disk, or as links if only their number
matters.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.build.teacher import Teacher
from ddk_cache.build.writer import ShardWriter
from ddk_cache.format.layout import object_name, record_name
from ddk_cache.format.manifest import create_root, write_plan
from ddk_cache.format.plan import ShardKey
from ddk_cache.read.cache import Cache, open_cache
from ddk_cache.storage.local import LocalStorage
from ddk_cache.testing import byte_tokenizer
from ddk_cache.types import SPLITS

VOCAB = 2048
SEQ_LEN = 1024
DOMAIN = "noise"


def teacher() -> Teacher:
    """Return a teacher whose output depends on two tokens, so that few positions are alike."""
    generator = torch.Generator().manual_seed(0)
    into = torch.randn(2, VOCAB, 48, generator=generator)
    out = torch.randn(48, VOCAB, generator=generator) * 0.35

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        before = tokens.roll(1, -1) * 251 % VOCAB
        return (into[0][tokens] + into[1][before]) @ out

    return Teacher(logits, VOCAB, {"class": "synthetic"})


def letters(corpus: Path, tokens: int) -> Path:
    """Write a corpus of one domain of about so many tokens of `byte_tokenizer`; return it."""
    corpus.mkdir(parents=True)
    words, alphabet = random.Random(0), [chr(code) for code in range(33, 127)]
    texts = ["".join(words.choices(alphabet, k=4095)) for _ in range(tokens // 4096)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (corpus / f"{DOMAIN}.jsonl").write_text(lines)
    return corpus


def built(path: Path, targets: str, tokens: int, shard_rows: int) -> Path:
    """Build a cache of one domain of about so many tokens."""
    corpus = letters(path.with_suffix(".corpus"), tokens)
    config = BuildConfig(seq_len=SEQ_LEN, targets=targets, shard_rows=shard_rows, holdout=0.0)
    build_cache(path, corpus, teacher(), byte_tokenizer(), config)
    shutil.rmtree(corpus)
    return path


class Multiplied:
    """A cache in the making whose training rows are the whole shards of another, repeated."""

    def __init__(self, source: Path, times: int, out: Path) -> None:
        cache = open_cache(source)
        self.source, self.out, self.spec = source, out, cache.spec
        whole = range(cache.plan(DOMAIN).rows(SPLITS[0]) // cache.spec.shard_rows)
        self.keys = [ShardKey(DOMAIN, SPLITS[0], number) for number in whole]
        self.count = len(self.keys) * times
        self._begin(cache)
        self._write_records(cache)

    def _begin(self, cache: Cache) -> None:
        """Write root, tokenizer, Zarr's documents and the plan."""
        storage = LocalStorage(self.out)
        store = ShardWriter(storage, self.spec)
        create_root(storage, cache.manifest.root)
        shutil.copytree(cache.tokenizer_path, self.out / "tokenizer")
        rows = {SPLITS[0]: self.count * self.spec.shard_rows, SPLITS[1]: 0}
        portion = dataclasses.replace(cache.plan(DOMAIN).portions[0], rows=rows)
        plan = dataclasses.replace(cache.plan(DOMAIN), portions=(portion,))
        plan = dataclasses.replace(plan, metadata=store.metadata(DOMAIN, plan))
        store.restore_metadata(plan)
        write_plan(storage, self.spec, DOMAIN, plan)
        storage.clean_up()

    def _write_records(self, cache: Cache) -> None:
        """Write all records, without a flush for each, and empty files that show the rows."""
        records = [cache.record(key) for key in self.keys]
        for number in range(self.count):
            key = ShardKey(DOMAIN, SPLITS[0], number)
            path = self.out / record_name(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            record = dataclasses.replace(records[number % len(records)], key=key)
            path.write_bytes(record.dump())
            tokens = self.out / object_name(self.spec, key, "tokens")
            tokens.parent.mkdir(parents=True)
            tokens.touch()

    def place(self, numbers: Iterable[int], *, link: bool) -> None:
        """Give shards their objects: links to those they repeat, or copies."""
        carry = os.link if link else shutil.copyfile
        for number in numbers:
            old, new = self.keys[number % len(self.keys)], ShardKey(DOMAIN, SPLITS[0], number)
            for array in self.spec.arrays:
                path = self.out / object_name(self.spec, new, array)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                carry(self.source / object_name(self.spec, old, array), path)
