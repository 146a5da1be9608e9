"""Caches to measure reading with: built from synthetic text and logits, then multiplied.

The teacher is two small random matrices, scaled so that its entropy is that of a language model
on text (about two nats); it costs seconds. The build is the real one, so whatever a cache holds
is stored as it always is. Multiplying repeats its shards under new numbers, each with a record of
its own: as copies where bytes have to be read from the disk, as links where only their number
matters.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from ddk_cache.build import build
from ddk_cache.corpus import find_sources
from ddk_cache.manifest import Manifest, create_root, write_plan
from ddk_cache.objects import Folder
from ddk_cache.reader import open_cache
from ddk_cache.records import object_path, read_record
from ddk_cache.schema import SPLITS, DomainPlan, ShardKey
from ddk_cache.store import Store
from ddk_cache.teacher import Teacher

VOCAB = 4096
SEQ_LEN = 1024
SHARD_ROWS = 64
DOMAIN = "noise"


def tokenizer() -> Any:
    """Return a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "<|endoftext|>"
    vocab = {end: 0} | {letter: index + 1 for index, letter in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([end])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=end, eos_token=end)


def teacher() -> Teacher:
    """Return a teacher whose word depends on two tokens, so that hardly two positions agree."""
    generator = torch.Generator().manual_seed(0)
    into = torch.randn(2, VOCAB, 48, generator=generator)
    out = torch.randn(48, VOCAB, generator=generator) * 0.35

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        before = tokens.roll(1, -1) * 251 % VOCAB
        return (into[0][tokens] + into[1][before]) @ out

    return Teacher(logits, VOCAB, {"class": "synthetic"})


def built(path: Path, targets: str, tokens: int) -> Path:
    """Build a cache of one domain of about so many tokens."""
    corpus = path.with_suffix(".corpus")
    corpus.mkdir(parents=True)
    words = random.Random(0)
    letters = [chr(code) for code in range(33, 127)]
    lines = ["".join(words.choices(letters, k=4095)) for _ in range(tokens // 4096)]
    (corpus / f"{DOMAIN}.jsonl").write_text("".join(f'{{"text": {_quoted(x)}}}\n' for x in lines))
    settings: dict[str, Any] = {"seq_len": SEQ_LEN, "shard_rows": SHARD_ROWS, "holdout": 0.0}
    build(path, find_sources(corpus), teacher(), tokenizer(), target_spec=targets, **settings)
    shutil.rmtree(corpus)
    return path


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)


def multiplied(path: Path, times: int, out: Path, *, link: bool) -> Path:
    """Make a cache whose training rows are those of another, repeated; whole shards only."""
    source = open_cache(path)
    spec, plan = source.spec, source.plan(DOMAIN)
    whole = [e for e in source.committed_extents(DOMAIN, SPLITS[0]) if e.rows == spec.shard_rows]
    keys = [ShardKey(DOMAIN, SPLITS[0], e.start // spec.shard_rows) for e in whole]
    count = len(keys) * times
    rows = {SPLITS[0]: count * spec.shard_rows, SPLITS[1]: 0}
    portion = dataclasses.replace(plan.portions[0], rows=rows)
    objects = Folder(out)
    out.mkdir()
    create_root(objects, source.manifest.root)
    shutil.copytree(source.tokenizer_path, out / "tokenizer")
    store = Store(out, spec)
    grown = DomainPlan((portion,))
    grown = DomainPlan((portion,), store.metadata(DOMAIN, grown))
    store.restore_metadata(grown)
    _copy_shards(source.root, out, keys, count, link, source.manifest)
    write_plan(objects, spec, DOMAIN, grown)
    store.sweep()
    return out


def _copy_shards(
    source: Path, out: Path, keys: list[ShardKey], count: int, link: bool, manifest: Manifest
) -> None:
    """Give the shards `count` numbers in turn; flushing each record would take most of the time."""
    spec, carry = manifest.spec, os.link if link else shutil.copyfile
    records = {key: read_record(Folder(source), manifest, key) for key in keys}
    for number in range(count):
        old, new = keys[number % len(keys)], ShardKey(DOMAIN, SPLITS[0], number)
        for array in spec.arrays:
            place = object_path(out, spec, new, array)
            place.parent.mkdir(parents=True)
            carry(object_path(source, spec, old, array), place)
        record = dataclasses.replace(records[old], key=new)
        path = out / "commits" / DOMAIN / SPLITS[0] / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record.dump())
