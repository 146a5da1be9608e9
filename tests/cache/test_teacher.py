"""Teachers: complete, causal, with a name, and not larger than they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddk_cache import InputError, Teacher, load_teacher
from ddk_cache.testing import VOCAB, random_teacher


def test_a_model_is_loaded_with_its_limits(teacher_dir: Path) -> None:
    teacher = load_teacher(teacher_dir)
    assert (teacher.vocab_size, teacher.positions) == (VOCAB, 64)
    assert teacher(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, VOCAB)
    assert teacher.identity == load_teacher(str(teacher_dir)).identity
    assert teacher.identity["dtype"] == "float32"


def test_a_checkpoint_with_missing_weights_is_refused(teacher_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "teacher"
    shutil.copytree(teacher_dir, path)
    weights = load_file(path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights of its model: model\.norm\.weight"):
        load_teacher(path)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=VOCAB, num_attention_heads=2, **sizes)
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a causal language model"):
        load_teacher(tmp_path)


def test_learned_positions_are_a_limit(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=48, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert load_teacher(tmp_path).positions == 48


def test_a_name_must_be_text() -> None:
    good = random_teacher()
    wrong: Any = None
    with pytest.raises(InputError, match="name of the teacher: got None, expected text"):
        Teacher(good.logits, VOCAB, good.identity, name=wrong)
