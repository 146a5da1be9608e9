"""The student: loading or making it, checking it against a cache, and saving it.

A student may be new (a config.json), or any causal language model; weights are float32 whatever
the checkpoint holds, because small updates vanish in shorter types.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ddk_cache import Cache, InputError, MismatchError, atomic
from ddk_cache.hf import identify_tokenizer, load, load_model, load_tokenizer
from ddk_train.lora import is_adapted, load_adapter
from ddk_train.provenance import IDENTITY

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_student(name: str, cache: Cache, seed: int) -> Any:
    """Load a student, or make a fresh one from a config.json, for the tokens of a cache.

    Raises:
        InputError: there is no such model, or its vocabulary is too small for the cache.
        MismatchError: it has a tokenizer, and that is another than the cache's.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    if Path(name).suffix == ".json":
        config = load("student config", "AutoConfig", name)
        student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        student = load_model("student", name, dtype=torch.float32)
        check_tokenizer(name, cache)
    width = student.config.get_text_config().vocab_size
    needed = len(load_tokenizer(cache.tokenizer_path))
    if width < needed:
        raise InputError(
            f"the student {name!r} has outputs for {width:,} tokens; the cache's tokenizer has "
            f"{needed:,}. Give it a vocab_size of at least that."
        )
    return student


def check_tokenizer(name: str, cache: Cache) -> None:
    """Raise MismatchError where the student's tokenizer gives an id another string."""
    local = Path(name)
    if local.is_dir() and not any((local / file).exists() for file in TOKENIZER_FILES):
        return  # a bare model: it will be saved with the cache's tokenizer
    theirs = identify_tokenizer(load_tokenizer(name))["vocabulary"]
    ours = cache.spec.tokenizer["vocabulary"]
    if theirs != ours:
        raise MismatchError(
            f"the student {name!r} has another tokenizer than the cache {cache.where} (vocabulary "
            f"{theirs}, the cache has {ours}). Use a student over the cache's tokenizer."
        )


def save_student(student: Any, cache: Cache, path: Path, made_from: dict[str, Any]) -> None:
    """Write the student with its tokenizer as an ordinary Hugging Face model, atomically.

    Beside it stands what it was made from. An adapter that was not merged is written by itself.
    """
    with atomic.whole(path) as partial:
        student.save_pretrained(partial)
        shutil.copytree(cache.tokenizer_path, partial, dirs_exist_ok=True)
        (partial / IDENTITY).write_text(json.dumps(made_from, indent=1))


def load_weights(student: Any, path: Path) -> None:
    """Give a student the weights that its `save_pretrained` wrote into a directory."""
    if is_adapted(student):
        load_adapter(student, path)
        return
    saved = type(student).from_pretrained(path, dtype=torch.float32)
    student.load_state_dict(saved.state_dict())
