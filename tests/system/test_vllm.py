"""A real serving engine: vLLM on the CPU beside transformers, on the shared teacher.

It takes minutes and a virtual environment of its own, which scripts/setup-vllm makes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_cache.build.targets import Scores
from ddk_cache.build.teacher import Call, Teacher
from ddk_cache.errors import InputError
from ddk_cache.format.spec import TargetSpec
from ddk_cache.hf import load_tokenizer
from ddk_cache.models.load import load_teacher
from ddk_cache.read.cache import Cache
from ddk_cache.served.teacher import load_served
from tests.s3 import free_port

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
S, B = 128, 16
TOP64 = TargetSpec.parse("topk:64")

HIDDEN = ("--runner", "pooling", "--convert", "embed", "--pooler-config",
          '{"task": "token_embed", "use_activation": false}')  # fmt: skip
OPTIONS = ("--max-model-len", str(S + 2), "--dtype", "float32", "--enforce-eager",
           "--max-logprobs", "64", "--no-enable-prefix-caching", "--host", "127.0.0.1")  # fmt: skip
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-vllm: run scripts/setup-vllm"),
]


@contextmanager
def vllm(model: Path, log: Path, *options: str) -> Iterator[str]:
    """Serve a model; yield the address once it answers."""
    port = free_port()
    words = [PYTHON, ROOT / "scripts" / "vllm_cpu.py", "serve", model, "--served-model-name", "it"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*map(str, words), "--port", str(port), *OPTIONS, *options],
            env=os.environ | ENVIRONMENT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def load_when_up(url: str, log: Path, tokenizer: Any, **settings: Any) -> Teacher:
    deadline = time.monotonic() + 600
    while True:
        try:
            return load_served(url, tokenizer, **settings)
        except InputError as error:
            if "does not answer" not in str(error) or time.monotonic() > deadline:
                raise AssertionError(log.read_text()[-3000:]) from error
            time.sleep(1)


def rows(tokenizer: Any) -> torch.Tensor:
    """Return (B, S+1) tokens of this project's own pages."""
    text = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer(text)["input_ids"][: B * (S + 1)]
    return torch.tensor(ids).reshape(B, S + 1)


@torch.inference_mode()
def scores(teacher: Teacher, tokens: torch.Tensor) -> Scores:
    offsets, chosen = torch.zeros(B, S, dtype=torch.float64), torch.zeros(B, dtype=torch.long)
    return teacher.scores(Call(tokens, chosen, TOP64, (), offsets))[0]


def agree(teacher: Teacher, model: Path, tokenizer: Any) -> None:
    """Check label log-probabilities to 1e-3 nats, and 99.9 % of ids."""
    tokens = rows(tokenizer)
    got, expected = scores(teacher, tokens), scores(load_teacher(str(model)), tokens)
    torch.testing.assert_close(got.label_logprob, expected.label_logprob, atol=1e-3, rtol=0)
    torch.testing.assert_close(got.logprobs, expected.logprobs, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        got.tail_logprob.exp(), expected.tail_logprob.exp(), atol=1e-4, rtol=0
    )
    assert (got.ids == expected.ids).double().mean() > 0.999


def test_hidden_states_of_vllm(
    data: Path, tmp_path: Path, make_cache: Callable[..., Cache]
) -> None:
    model, log = data / "teacher", tmp_path / "log"
    tokenizer = load_tokenizer(model)
    with vllm(model, log, *HIDDEN) as url:
        teacher = load_when_up(url, log, tokenizer, head=model, targets=TOP64)
        assert teacher.identity["engine"] == "vllm"
        agree(teacher, model, tokenizer)
        make_cache(
            tmp_path / "mix.zarr", teacher=teacher, tokenizer=tokenizer, targets="sampled:16"
        ).require_finished()
        with pytest.raises(InputError, match="does not return log-probabilities"):
            load_served(url, tokenizer, targets=TOP64)


def test_log_probabilities_of_vllm(data: Path, tmp_path: Path) -> None:
    model, log = data / "teacher", tmp_path / "log"
    tokenizer = load_tokenizer(model)
    with vllm(model, log) as url:
        agree(load_when_up(url, log, tokenizer, targets=TOP64), model, tokenizer)
        with pytest.raises(InputError, match="max allowed: 64"):
            load_served(url, tokenizer, targets=TargetSpec.parse("topk:65"))
        with pytest.raises(InputError, match="does not return hidden states"):
            load_served(url, tokenizer, head=model, targets=TOP64)
