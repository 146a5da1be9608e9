"""What several test files share: commands, directory trees, corpora, exact references."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from ddk_cache import CacheSpec
from ddk_cache.testing import VOCAB
from ddk_train import TrainConfig

Configure = Callable[..., TrainConfig]

RUN: dict[str, Any] = {
    "steps": 12,
    "interval": 4,
    "checkpoint_every": 3,
    "rows": 6,
    "micro_rows": 4,
    "eval_rows": 5,
    "lr": 3e-3,
    "log_every": 1,
    "keep": 99,
}
"""Settings of a run of a few seconds, with a ragged last micro batch."""

BUILDER = """
import sys, time
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.build.teacher import Teacher
from ddk_cache.testing import BUILD, byte_tokenizer, random_teacher
teacher = random_teacher()
def slow(tokens):
    time.sleep(0.02)
    return teacher.logits(tokens)
print("ready", flush=True)
slow = Teacher(slow, teacher.vocab_size, teacher.identity)
build_cache(sys.argv[1], sys.argv[2], slow, byte_tokenizer(), BuildConfig(**BUILD))
"""
"""A slow build of argv[2] at argv[1], for a process that is killed; it prints one line first."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
"""Sizes of a tiny model, by the names that most architectures use."""

VICTIMS = [
    "domains/letters/train/target_ids/c/1/0/0",
    "domains/notes/validation/label_logprob/c/0/0",
    "domains/digits/train/tokens/c/0/0",
    "domains/digits/train/loss_mask/c/1/0",
    "domains/digits/train/tokens/zarr.json",
    "domains/letters/zarr.json",
    "domains/zarr.json",
    "commits/letters/train/0.json",
    "tokenizer/tokenizer.json",
]
"""One file of the `cache` fixture for each kind that a cache has, damage to which is mendable."""


def tree(root: Path) -> dict[str, bytes]:
    """Return every file below a directory with its bytes."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def command(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start `ddk-cache …` or `ddk-train …` as a process of its own."""
    package = {"ddk-cache": "ddk_cache", "ddk-train": "ddk_train"}[str(words[0])]
    code = f"from {package}.cli import main; main(prog_name={words[0]!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a process; return its exit code, stdout and stderr."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def failure(process: subprocess.Popen[str]) -> str:
    """Wait for a process that fails, and return its error: one line, without a traceback."""
    code, _, err = finish(process)
    assert code == 1, err
    assert "Traceback" not in err
    (said,) = (line for line in err.splitlines() if line.startswith("Error:"))
    return said


def call(group: Any, *words: object, **env: str) -> Result:
    """Run a command in this process."""
    return CliRunner(env=env).invoke(group, [str(word) for word in words])


def quiet(amount: int) -> None:
    """Ignore progress."""


def timeless(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return metrics or history without the columns that depend on the clock."""
    clock = {"seconds", "tokens_per_second", "wait", "eval_share", "eval_seconds"}
    return [{k: v for k, v in line.items() if k not in clock} for line in metrics]


def jsonl(records: Iterable[object]) -> str:
    """Return records as JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def lines(first: int, last: int, letters: str) -> str:
    """Return JSONL documents `first` … `last` − 1 of an endless domain."""
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list(letters), 40)) for _ in range(last)]
    return jsonl({"text": text} for text in texts[first:])


def grow(folder: Path) -> None:
    """Lengthen the domain of the `growing` fixture, and add another."""
    (folder / "one.jsonl").write_text(lines(0, 70, "abc"))
    (folder / "two.jsonl").write_text(lines(0, 30, "xyz"))


def make_spec(**changes: object) -> CacheSpec:
    """Return the spec of a small cache."""
    values = {
        "seq_len": 16,
        "vocab_size": 300,
        "targets": "topk:8",
        "holdout": 0.1,
        "chunk_rows": 2,
        "shard_rows": 8,
        "logprob_step": 0.001,
        "teacher": {"class": "x"},
        "tokenizer": {"vocabulary": "y"},
    }
    return CacheSpec.from_json(values | changes)


def sharp(vocab: int, positions: int = 40) -> torch.Tensor:
    """Return logits (positions, vocab) from flat to nearly one-hot."""
    generator = torch.Generator().manual_seed(vocab)
    scale = torch.linspace(0.1, 8, positions)[:, None]
    return torch.randn(positions, vocab, generator=generator) * scale


def divergence_by_definition(name: str, t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return a divergence (P) of full distributions (P, V), straight from its definition."""

    def kl(p: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return (torch.xlogy(p, p) - torch.xlogy(p, r)).sum(-1)

    base, _, text = name.partition(":")
    share = float(text or 0)
    mixed = share * t + (1 - share) * q
    return {
        "forward_kl": lambda: kl(t, q),
        "reverse_kl": lambda: kl(q, t),
        "jsd": lambda: share * kl(t, mixed) + (1 - share) * kl(q, mixed),
        "skew_kl": lambda: kl(t, mixed),
    }[base]()


def random_model(kind: str, **settings: Any) -> Any:
    """Return a tiny causal language model of an architecture, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


HEADS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # has a bias
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 1},
}
"""Architectures whose heads differ, with what makes them differ."""


def loud_model(kind: str, **settings: Any) -> Any:
    """Return a `random_model` whose weights are so large that its parts matter."""
    model = random_model(kind, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a saved student."""
    return load_file(path / "model.safetensors")
