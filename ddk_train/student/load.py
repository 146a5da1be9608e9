"""The student: loading or making it, checking it against a cache, and saving it.

A student may be new (a config.json), or any causal language model. It trains with float32 weights
whatever its files hold, because small updates vanish in shorter types, and is saved in the type of
its files. Its own tokenizer is saved with it where it has one: ids agree with the cache's, while
chat template, padding side and maximum length are the student's.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddk_cache import Cache, CorruptCacheError, InputError, MismatchError, atomic
from ddk_cache.hashing import canonical, digest
from ddk_cache.hf import hash_weights, identify_tokenizer, load, load_model, load_tokenizer
from ddk_train.provenance import IDENTITY
from ddk_train.student.lora import is_adapted, load_adapter

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

POSITION_OFFSET = 2
"""Entries that a table of position embeddings may have beyond the positions (OPT)."""


@dataclass(frozen=True)
class Student:
    """A student as it was loaded."""

    model: Any
    """A causal language model of transformers, float32, on the CPU."""
    hash: str
    """Content hash of its weights, or of the config of a fresh student."""
    tokenizer: Any = None
    """Its own tokenizer, or None where it is to be saved with the cache's."""
    dtype: torch.dtype = torch.float32
    """Type of the weights in its files."""


def load_student(
    name: str, cache: Cache, seed: int = 0, *, trust_remote_code: bool = False
) -> Student:
    """Load a student, or make a fresh one from a config.json, for the tokens of a cache.

    Raises:
        InputError: there is no such model, it lacks weights, or it is too small for the cache.
        MismatchError: its tokenizer and the cache's give ids different strings.
    """
    torch.manual_seed(seed)
    if Path(name).suffix == ".json":
        student = fresh_student(name, trust_remote_code)
    else:
        student = trained_student(name, cache, trust_remote_code)
    check_size(name, student.model, cache)
    return student


def fresh_student(name: str, trust_remote_code: bool) -> Student:
    """Return a student of a config.json, with random weights from torch's generator."""
    from transformers import AutoModelForCausalLM

    config = load("student config", "AutoConfig", name, trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    return Student(model, digest(canonical(json.loads(Path(name).read_text()))))


def trained_student(name: str, cache: Cache, trust_remote_code: bool) -> Student:
    """Return a student from a model directory or the hub."""
    trust = {"trust_remote_code": trust_remote_code}
    model = load_model("student", name, dtype=torch.float32, **trust)
    tokenizer = own_tokenizer(name, cache, **trust)
    return Student(model, hash_weights(model), tokenizer, stored_dtype(name, **trust))


def stored_dtype(name: str, **trust: bool) -> torch.dtype:
    """Return the type that the config of a model names for its weights, else float32."""
    if (Path(name) / "adapter_config.json").exists():
        return torch.float32
    named = load("student config", "AutoConfig", name, **trust).dtype
    found = getattr(torch, named, None) if isinstance(named, str) else named
    return found or torch.float32


def own_tokenizer(name: str, cache: Cache, **trust: Any) -> Any:
    """Return the student's tokenizer, or None for a local model without one.

    Raises:
        MismatchError: it gives an id another string than the cache's tokenizer.
    """
    local = Path(name)
    if local.is_dir() and not any((local / file).exists() for file in TOKENIZER_FILES):
        return None
    tokenizer = load_tokenizer(name, **trust)
    theirs = identify_tokenizer(tokenizer)["vocabulary"]
    ours = cache.spec.tokenizer["vocabulary"]
    if theirs != ours:
        raise MismatchError(
            f"the student {name!r} has another tokenizer than the cache {cache.where}: got "
            f"vocabulary {theirs}, expected {ours}. Use a student with the cache's tokenizer."
        )
    return tokenizer


def check_size(name: str, model: Any, cache: Cache) -> None:
    """Check that a student has outputs for all tokens and positions for the rows of a cache.

    Rotary positions beyond the configured maximum work, only worse, and are a warning; a table of
    position embeddings has no entry for them.

    Raises:
        InputError: it has too few outputs or too few position embeddings.
    """
    config, rows = model.config.get_text_config(), cache.spec.seq_len
    needed = len(load_tokenizer(cache.tokenizer_path))
    if config.vocab_size < needed:
        raise InputError(
            f"the student {name!r} has outputs for {config.vocab_size:,} tokens; the cache's "
            f"tokenizer has {needed:,}. Give it a vocab_size of at least that."
        )
    positions = getattr(config, "max_position_embeddings", None) or rows
    if positions >= rows:
        return
    words = (
        f"the student {name!r} has {positions:,} positions; rows of {cache.where} have {rows:,}."
    )
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    if any(
        table is not model.get_input_embeddings()
        and positions <= table.num_embeddings <= positions + POSITION_OFFSET
        for table in tables
    ):
        raise InputError(
            f"{words} Use a student with more positions, or a cache with a smaller --seq-len."
        )
    log.warning(f"{words} It may not learn the positions beyond them well.")


def save_student(
    student: Student, trained: Any, cache: Cache, path: Path, made_from: dict[str, Any]
) -> None:
    """Write the trained model of a student as an ordinary Hugging Face model, atomically.

    It gets the tokenizer, and a file that says what it was made from. An adapter that was not
    merged is written by itself. The weights of `trained` change to the type of the student's files.

    Raises:
        CorruptCacheError: a tokenizer file of the cache is missing or damaged.
    """
    if not is_adapted(trained):
        trained = trained.to(student.dtype)
    with atomic.whole(path) as partial:
        trained.save_pretrained(partial)
        if student.tokenizer is None:
            copy_tokenizer(cache, partial)
        else:
            student.tokenizer.save_pretrained(partial)
        (partial / IDENTITY).write_text(json.dumps(made_from, indent=1))


def copy_tokenizer(cache: Cache, path: Path) -> None:
    """Copy the tokenizer files that the cache's root names, by hash, over nothing that is there."""
    for name, (_, hashed) in cache.manifest.root.tokenizer_files.items():
        source = cache.tokenizer_path / name
        data = source.read_bytes() if source.is_file() else b""
        if digest(data) != hashed or (path / name).exists():
            raise CorruptCacheError(f"{source} is missing, damaged or not a tokenizer file.")
        (path / name).write_bytes(data)


def load_weights(model: Any, path: Path) -> None:
    """Load the weights that `save_pretrained` wrote into a directory into a model."""
    if is_adapted(model):
        load_adapter(model, path)
        return
    saved = type(model).from_pretrained(path, dtype=torch.float32)
    model.load_state_dict(saved.state_dict())
