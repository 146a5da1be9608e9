"""A tiny tokenizer, teacher, corpus, cache and student, for anybody's tests and examples.

Everything is real and small: real files, a real tokenizer, a real build. A cache takes about a
second and a few hundred kilobytes. The teacher is a random function rather than a trained model,
so losses mean nothing, but every shape, split and checksum is what a large cache has.
"""

from __future__ import annotations

import gzip
import json
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddk_cache.build.teacher import Teacher
    from ddk_cache.read.cache import Cache

END = "<|endoftext|>"

VOCAB = 300
"""Width of the teacher's output: 257 tokens, padded as most models are."""

BUILD: dict[str, Any] = {
    "seq_len": 16,
    "targets": "topk:8",
    "holdout": 0.3,
    "batch_rows": 4,
    "chunk_rows": 2,
    "shard_rows": 8,
}
"""Build settings that give several shards and a ragged last one from a few kilobytes of text."""


def byte_tokenizer() -> Any:
    """Return a tokenizer whose tokens are the 256 bytes and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {END: 0} | {letter: index + 1 for index, letter in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=END, eos_token=END)


def random_teacher(seed: int = 0, scale: float = 1.0) -> Teacher:
    """Return a teacher made of two random matrices; a larger `scale` makes it more certain."""
    import torch

    from ddk_cache.build.teacher import Teacher

    generator = torch.Generator().manual_seed(seed)
    into = torch.randn(VOCAB, 12, generator=generator)
    out = torch.randn(12, VOCAB, generator=generator) * scale

    def logits(tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        return into[tokens] @ out

    identity = {"class": "random", "seed": str(seed)}
    return Teacher(logits, VOCAB, identity, takes_positions=True)


def write_corpus(folder: Path) -> Path:
    """Write three domains in three formats (JSONL, CSV, text) into a new folder, and return it."""
    folder.mkdir(parents=True)
    generator = random.Random(0)

    def text(letters: str, length: int) -> str:
        return "".join(generator.choice(letters) for _ in range(length))

    with gzip.open(folder / "letters.jsonl.gz", "wt") as file:
        for _ in range(40):
            file.write(json.dumps({"text": text("abcde ", 50)}) + "\n")
    rows = "".join(f'"{text("0123456789", 30)}",x\n' for _ in range(30))
    (folder / "digits.csv").write_text("text,other\n" + rows)
    (folder / "notes").mkdir()
    for number in range(20):
        (folder / "notes" / f"{number:02}.txt").write_text(text("xyz\n ", 60))
    return folder


def tiny_cache(path: str | Path, *, teacher: Teacher | None = None, **settings: Any) -> Cache:
    """Build a finished cache of `write_corpus` at a path or URL, and open it.

    `settings` go to the build, over those of `BUILD`.
    """
    from ddk_cache.build.config import BuildConfig
    from ddk_cache.build.job import build_cache
    from ddk_cache.read.cache import open_cache

    config = BuildConfig(**BUILD | settings)
    with tempfile.TemporaryDirectory() as work:
        corpus = write_corpus(Path(work) / "corpus")
        build_cache(path, corpus, teacher or random_teacher(), byte_tokenizer(), config)
    return open_cache(path)


def student_config(**changes: Any) -> dict[str, Any]:
    """Return the config.json of a Llama of a few thousand weights that fits `tiny_cache`."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
    } | changes
