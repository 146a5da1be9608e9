"""Adapters: trained, merged and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ddk_train import train
from tests.helpers import Configure, read_weights, tree


@pytest.fixture
def trained(configure: Configure) -> str:
    return str(train(configure("trained", steps=10)).student)


def test_an_adapter_is_trained_and_merged(configure: Configure, trained: str) -> None:
    pytest.importorskip("peft")
    whole = train(configure("lora", student=trained, lora_rank=2))
    before, after = read_weights(Path(trained)), read_weights(whole.student)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}


def test_a_resumed_adapter_is_bit_for_bit_the_uninterrupted_one(
    configure: Configure, trained: str
) -> None:
    pytest.importorskip("peft")
    whole = train(configure("lora", student=trained, lora_rank=2, keep_adapter=True))
    first = tree(whole.checkpoints()[-1][1])
    for _, path in whole.checkpoints()[2:]:
        shutil.rmtree(path)
    again = train(configure("lora", student=trained, lora_rank=2, keep_adapter=True))
    second = tree(again.checkpoints()[-1][1])
    for text in (first, second):
        state = json.loads(text.pop("state.json"))
        text["state"] = json.dumps(state | {"seconds": 0, "eval_seconds": 0}).encode()
    assert first == second
    assert (again.student / "adapter_model.safetensors").exists()
