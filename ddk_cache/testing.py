"""The smallest real tokenizer, and a cache to go with it, for tests, tortures and measurements."""

from __future__ import annotations

from typing import Any

END = "<|endoftext|>"

VOCAB = 300
"""Width of the head of a tiny teacher: 257 tokens, padded."""

BUILD: dict[str, Any] = {
    "seq_len": 16,
    "targets": "topk:8",
    "holdout": 0.3,
    "batch_rows": 4,
    "chunk_rows": 2,
    "shard_rows": 8,
}
"""Settings that give several shards and a ragged last one from a few kilobytes."""


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
