"""examples/smollm2 from its first command to its last, with a tiny teacher in place of the real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_cache.testing import student_config
from ddk_train.run.directory import Run

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_teacher(path: Path, tokenizer: Any) -> None:
    """Save a random model of 12 layers and a tokenizer of bytes that has a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = student_config(num_hidden_layers=12, max_position_embeddings=512)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"chat_template": TEMPLATE}))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_runs_and_resumes(tmp_path: Path, tokenizer: Any) -> None:
    tiny_teacher(tmp_path / "tiny", tokenizer)
    there = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    there |= {"DDK_REAL_TEACHER": str(tmp_path / "tiny")}

    def run(script: str = "run") -> str:
        done = subprocess.run(
            [EXAMPLE / script], cwd=tmp_path, env=os.environ | there, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    work = tmp_path / "smollm2"
    config = json.loads((work / "runs" / "0" / "student" / "config.json").read_bytes())
    assert config["num_hidden_layers"] == 10
    assert (work / "report.html").stat().st_size > 10_000
    assert first.count("=== ") == 3
    metrics = (work / "runs" / "0" / "metrics.jsonl").read_bytes()
    run()
    assert (work / "runs" / "0" / "metrics.jsonl").read_bytes() == metrics
    run("pairs")
    (first_pairs, *_) = Run(work / "runs" / "pairs").history()
    assert first_pairs["margin"] is not None
