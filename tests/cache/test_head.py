"""Heads of checkpoints: the model's own logits from its hidden states, and a file of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddk_cache import InputError
from ddk_cache.head import Head, extract_head, load_head
from tests.helpers import HEADS, loud_model

MODELS: dict[str, dict[str, Any]] = {
    **HEADS,
    "qwen2": {"tie_word_embeddings": False},
    "gpt_neox": {},  # its checkpoints call the head embed_out
}


def save_model(name: str, path: Path, **options: Any) -> Any:
    """Save a model with random weights, and return it."""
    model = loud_model(name, **MODELS[name])
    model.save_pretrained(path, **options)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_head_gives_the_logits_of_its_model(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path / "model")
    extract_head(tmp_path / "model").save(tmp_path / "head")
    head = load_head(tmp_path / "head")
    assert (head.vocab_size, head.hidden_size) == (300, 16)
    with torch.inference_mode():
        out = model(input_ids=torch.arange(20)[None], output_hidden_states=True)
        got = head.logits(out.hidden_states[-1])
    torch.testing.assert_close(got, out.logits)


def test_a_head_is_the_same_from_a_checkpoint_in_shards_a_directory_and_a_file(
    tmp_path: Path,
) -> None:
    save_model("qwen2", tmp_path / "whole")
    save_model("qwen2", tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    head = load_head(tmp_path / "whole")
    head.save(tmp_path / "head")
    assert (
        head.hash() == load_head(tmp_path / "shards").hash() == load_head(tmp_path / "head").hash()
    )
    assert head.hash() != Head(head.weight, scale=2.0).hash()
    moved = head.to(torch.device("cpu"), torch.float64)
    assert moved.weight.dtype == torch.float64


def test_the_rest_of_a_checkpoint_is_not_read(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path / "model", max_shard_size="20KB")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["lm_head.weight"]
    for file in (tmp_path / "model").glob("*.safetensors"):
        if file.name != shard:
            file.unlink()
    assert extract_head(tmp_path / "model").vocab_size == 300


def test_files_that_are_not_heads_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "head", tmp_path / "model"
    path.write_text("no")
    with pytest.raises(InputError, match="is not a safetensors file"):
        load_head(path)
    save_file({"weight": torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match=r"is not a head\. Make one:  ddk-cache head"):
        load_head(path)
    Head(torch.zeros(2, 2)).save(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(InputError, match="its hash has changed"):
        load_head(path)
    with pytest.raises(InputError, match="cannot be written"):
        Head(torch.zeros(2, 2)).save(tmp_path / "nowhere" / "head")
    with pytest.raises(InputError, match="there is no model at"):
        load_head(tmp_path / "nothing")
    save_model("qwen2", model)
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(InputError, match=r"has no tensor 'lm_head\.weight'"):
        load_head(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no safetensors files"):
        load_head(model)
