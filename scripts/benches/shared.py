"""Rows, teacher and student of the measurements that train.

The teacher is the small one beside the corpus, or any model directory; the student is a small fresh
Llama, or a cut of the teacher: some of its layers, evenly spaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddk_cache import load_teacher
from ddk_cache.build.config import BuildConfig
from ddk_cache.console import say
from ddk_cache.corpus.rows import Tally, token_rows
from ddk_cache.corpus.sources import find_sources
from ddk_cache.hf import load_tokenizer

SEQ_LEN = 256

STUDENT = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
"""A Llama of 2.9 M parameters at a vocabulary of 16,384."""

Teacher = Callable[[torch.Tensor], torch.Tensor]
"""(B, S) tokens → (B, S, V) float32 logits."""


def teacher_of(path: Path, sharpness: float = 1.0) -> Teacher:
    """Return the teacher of a model directory, its logits divided by `sharpness`."""
    model = load_teacher(str(path), dtype="float32", device="cpu")

    @torch.inference_mode()
    def logits(tokens_BS: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            raw_BSV = model.logits(tokens_BS)
        return raw_BSV.float() / sharpness

    return logits


def rows_of(corpus: Path, teacher: Path, each: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return at most `each` rows (R, S+1) of every domain, by domain and split."""
    tokenizer, found = load_tokenizer(str(teacher)), {}
    spec = BuildConfig(seq_len=SEQ_LEN, holdout=0.1).spec(len(tokenizer), {}, {})
    for source in find_sources(corpus):
        parts: dict[str, list[torch.Tensor]] = {"train": [], "validation": []}
        for split, arrays in token_rows(source, tokenizer, spec, block=32, tally=Tally()):
            parts[split].append(torch.from_numpy(arrays["tokens"]))
            if sum(map(len, parts["train"])) >= each and parts["validation"]:
                break
        found[source.name] = {name: torch.cat(part)[:each] for name, part in parts.items()}
    return found


def batches(rows: dict[str, dict[str, torch.Tensor]], size: int, seed: int) -> Iterator[Any]:
    """Yield (size, S+1) training rows for ever, all domains alike, in an order of the seed."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.cat([part["train"] for part in rows.values()])
    while True:
        for numbers in torch.randperm(len(pool), generator=generator).split(size):
            if len(numbers) == size:
                yield pool[numbers]


def fresh_student(teacher: Path, layers: int, seed: int) -> Any:
    """Return a student of that many layers of the teacher, or for 0 a new one."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if not layers:
        vocab_size = AutoConfig.from_pretrained(teacher).vocab_size
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **STUDENT))
    student = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    kept = np.linspace(0, len(student.model.layers) - 1, layers).round().astype(int)
    student.model.layers = torch.nn.ModuleList(student.model.layers[n] for n in kept)
    student.config.num_hidden_layers = layers
    return student


def hidden_of(student: Any, tokens_BS1: torch.Tensor) -> torch.Tensor:
    """Return the hidden states (P, H) of rows. Products are in bfloat16, as on a GPU."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden_BSH: torch.Tensor = student.model(
            tokens_BS1[:, :-1], use_cache=False
        ).last_hidden_state
    return hidden_BSH.flatten(0, 1).bfloat16()


def warmed(student: Any, rows: Any, steps: int, lr: float, seed: int) -> Any:
    """Return a student after plain training of so many steps of 16 rows."""
    from ddk_train.loss.fused import Terms, fused_loss
    from ddk_train.loss.head import Head

    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    for step, tokens in zip(range(steps), batches(rows, 16, seed), strict=False):
        hidden = hidden_of(student, tokens)
        head, labels = Head(student.lm_head.weight), tokens[:, 1:].reshape(-1)
        sums = fused_loss(hidden, head, labels, None, Terms(0.0))
        (sums.loss / len(hidden)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            say(f"warming: step {step + 1} of {steps}, loss {sums.loss.item() / len(hidden):.3f}")
    return student
