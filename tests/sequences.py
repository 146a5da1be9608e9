"""A tiny teacher and student with a chat template, their prompts, responses and pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddk_cache import BuildConfig, build_cache, find_sources, load_teacher, load_tokenizer
from ddk_cache.read.cache import Cache, open_cache
from ddk_cache.sequences.config import SamplingConfig
from ddk_cache.sequences.decode import Responder, load_responder
from ddk_cache.sequences.generate import generate
from ddk_cache.sequences.pair import answer_prompts, build_pairs
from ddk_cache.testing import byte_tokenizer, student_config
from tests.helpers import jsonl

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)

STOPS = range(20)
"""Ids that end a response: many, so that a random model writes responses of different lengths."""

SAMPLING: dict[str, Any] = {"max_new_tokens": 12, "batch": 8}


@dataclass(frozen=True)
class Material:
    """Where everything is."""

    folder: Path

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def cache(self) -> Path:
        return self.folder / "mix.zarr"

    @property
    def answers(self) -> Path:
        return self.folder / "mix.zarr.answers"

    @property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder / "teacher")

    def responder(self, name: str = "teacher") -> Responder:
        return load_responder(self.folder / name, self.tokenizer)

    def open(self) -> Cache:
        return open_cache(self.cache)

    def pair(self, cache: Path, answers: Path) -> None:
        """Add pairs to a cache."""
        sources, teacher = find_sources(self.out), load_teacher(self.folder / "teacher")
        with open_cache(cache) as opened:
            config = SamplingConfig(**SAMPLING)
            answer_prompts(opened, sources, self.responder("student"), answers, config)
            build_pairs(opened, sources, answers, teacher, self.tokenizer, batch_rows=8)


def write_prompts(folder: Path, count: int) -> Path:
    """Write two domains of prompts of different lengths."""
    folder.mkdir()
    for name in ("sums", "words"):
        texts = (f"{name} {n} " * (1 + n % 3) for n in range(count))
        (folder / f"{name}.jsonl").write_text(jsonl({"prompt": text.strip()} for text in texts))
    return folder


def write_models(folder: Path) -> None:
    """Write a random teacher and a random student."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = byte_tokenizer()
    words.chat_template = TEMPLATE
    for name, seed in (("teacher", 0), ("student", 1)):
        torch.manual_seed(seed)
        config = student_config(hidden_size=32, max_position_embeddings=64, initializer_range=0.3)
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.generation_config.eos_token_id = list(STOPS)
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)


def make_material(folder: Path, count: int = 20) -> Material:
    """Write models and prompts, generate responses, build their cache, and add pairs."""
    made = Material(folder)
    write_models(folder)
    write_prompts(made.prompts, count)
    generate(made.prompts, made.out, made.responder(), SamplingConfig(samples=2, **SAMPLING))
    config = BuildConfig(
        seq_len=48, targets="topk:8", holdout=0.3, batch_rows=4, chunk_rows=2, shard_rows=8
    )
    teacher = load_teacher(folder / "teacher")
    build_cache(made.cache, made.out, teacher, made.tokenizer, config)
    made.pair(made.cache, made.answers)
    return made
