"""Planning a domain: a limit of tokens is the same again when it is repaired and grown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_cache import open_cache
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.build.teacher import Teacher
from ddk_cache.corpus.sources import find_sources
from ddk_cache.errors import InputError
from ddk_cache.testing import BUILD, VOCAB, byte_tokenizer, random_teacher
from tests.helpers import jsonl, tree


def write_mix(folder: Path, documents: int, tokens: int) -> Path:
    """Write a domain of documents of 41 tokens and a mix file that limits it."""
    texts = jsonl({"text": f"{n:04} " * 8} for n in range(documents))
    (folder / "data.jsonl").write_text(texts)
    mix = folder / "mix.yaml"
    mix.write_text(f"domains: {{some: {{path: data.jsonl, tokens: {tokens}}}}}")
    return mix


def make(
    folder: Path, mix: Path, tokenizer: Any, name: str = "mix.zarr", *, grow: bool = False
) -> Path:
    build_cache(
        folder / name,
        find_sources(mix),
        random_teacher(),
        tokenizer,
        BuildConfig(**BUILD),
        grow=grow,
    )
    return folder / name


def test_a_domain_that_was_cut_is_repaired_to_the_same_bytes(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = make(tmp_path, write_mix(tmp_path, 60, 1000), tokenizer)
    before = tree(path)
    assert open_cache(path).plan("some").tokens == 1000
    mix = write_mix(tmp_path, 60, 2000)
    make(tmp_path, mix, tokenizer, grow=True)
    grown = tree(path)
    assert open_cache(path).plan("some").tokens == 2000
    arrays = [name for name in before if name.startswith("domains/") and "/c/" in name]
    assert all(grown[name] == before[name] for name in arrays)
    for array in path.glob("domains/some/*/tokens/c/0/0"):
        array.unlink()
    make(tmp_path, mix, tokenizer, grow=True)
    assert tree(path).keys() == grown.keys()
    assert all(tree(path)[name] == grown[name] for name in grown if "/tokens/" in name)


def test_growing_a_domain_that_reached_its_limit_changes_nothing(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = make(tmp_path, write_mix(tmp_path, 60, 1000), tokenizer)
    plan = open_cache(path).plan("some")
    make(tmp_path, write_mix(tmp_path, 90, 1000), tokenizer, grow=True)
    assert open_cache(path).plan("some") == plan


def test_a_cache_built_inside_its_corpus_is_not_read(tmp_path: Path, tokenizer: Any) -> None:
    write_mix(tmp_path, 60, 1000)
    (tmp_path / "mix.yaml").unlink()
    path = make(tmp_path, tmp_path, tokenizer)
    before = tree(path)
    make(tmp_path, tmp_path, tokenizer)
    assert tree(path) == before
    assert open_cache(path).domains == ["data"]


def test_a_chat_domain_that_cannot_count_is_refused_before_it_is_scored(tmp_path: Path) -> None:
    scored = []
    random = random_teacher()

    def count(tokens: torch.Tensor) -> torch.Tensor:
        scored.append(bool(tokens.any()))  # a first batch, of zeros, is to try the teacher
        return random.logits(tokens)

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    teacher = Teacher(count, VOCAB, {"class": "none"})
    (tmp_path / "c").mkdir()
    for role, said in {"gpt": "conversation 1: message 1: got role", "user": "no assist"}.items():
        lines = [json.dumps({"messages": [{"role": role, "content": f"{n}"}]}) for n in range(50)]
        (tmp_path / "c" / "a.jsonl").write_text("\n".join(lines))
        sources, settings = (
            find_sources(tmp_path / "c"),
            BUILD | {"batch_rows": 2, "packing": "stream"},
        )
        with pytest.raises(InputError, match=said):
            build_cache(
                tmp_path / f"{role}.zarr", sources, teacher, tokenizer, BuildConfig(**settings)
            )
    assert not any(scored)
