"""A small serving engine on loopback that speaks vLLM's calls on a Hugging Face directory.

As a thread for most tests, and as a process (`python -m tests.teacher_server …`) to be killed.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from ddk_cache.build.teacher import DTYPES

CALLS = ("/v1/models", "/version", "/tokenize", "/pooling", "/v1/completions")


class TeacherServer(ThreadingHTTPServer):
    """One model, answered a prompt at a time."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        model: Path,
        port: int = 0,
        *,
        calls: tuple[str, ...] = CALLS,
        max_logprobs: int = 20,
        normalize: bool = False,
        noise: float = 0.0,
        delay: float = 0.0,
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__(("127.0.0.1", port), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.calls, self.max_logprobs, self.normalize = calls, max_logprobs, normalize
        self.noise, self.delay = noise, delay
        self.failures, self.closed = 0, False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @torch.inference_mode()
    def hidden(self, tokens: list[int]) -> torch.Tensor:
        out = self.model.model(input_ids=torch.tensor([tokens]), use_cache=False)
        hidden: torch.Tensor = out.last_hidden_state[0]
        hidden = hidden + self.noise * torch.randn_like(hidden)
        return hidden / hidden.norm(dim=-1, keepdim=True) if self.normalize else hidden

    @torch.inference_mode()
    def completion(self, tokens: list[int], k: int) -> dict[str, Any]:
        logprobs = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        logprobs = logprobs.log_softmax(-1)
        prompt: list[Any] = [None]
        for row, label in zip(logprobs[:-1], tokens[1:], strict=True):
            ids = dict.fromkeys([*row.topk(k).indices.tolist(), label])
            prompt.append({str(i): {"logprob": float(row[i])} for i in ids})
        best = int(logprobs[-1].argmax())
        greedy = {"tokens": [f"token_id:{best}"], "token_logprobs": [float(logprobs[-1, best])]}
        return {"choices": [{"text": "", "logprobs": greedy, "prompt_logprobs": prompt}]}


class Handler(BaseHTTPRequestHandler):
    server: TeacherServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any]) -> None:
        teacher = self.server
        time.sleep(teacher.delay)
        if teacher.closed:
            self.close_connection = True
            return
        with teacher.lock:
            failing = teacher.failures > 0
            teacher.failures -= failing
            if self.path not in teacher.calls:
                status, data = 404, b'{"detail": "Not Found"}'
            elif failing:
                status, data = 503, b"overloaded"
            else:
                status, data = self._call(teacher, body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _call(self, teacher: TeacherServer, body: dict[str, Any]) -> tuple[int, bytes]:
        answer: Any
        if self.path == "/v1/models":
            answer = {"data": [{"id": "tiny", "owned_by": "tests", "max_model_len": 64}]}
        elif self.path == "/version":
            answer = {"version": "1.0"}
        elif self.path == "/tokenize":
            ids = teacher.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            answer = {"tokens": ids}
        elif self.path == "/pooling":
            assert body["use_activation"] is False
            assert body["task"] == "token_embed"
            hidden = teacher.hidden(body["input"]).to(DTYPES[body["embed_dtype"]])
            return 200, hidden.contiguous().view(torch.uint8).numpy().tobytes()
        elif body["prompt_logprobs"] > teacher.max_logprobs:
            text = f"{body['prompt_logprobs']} is greater than max allowed: {teacher.max_logprobs}"
            return 400, json.dumps({"error": {"message": text}}).encode()
        else:
            answer = teacher.completion(body["prompt"], body["prompt_logprobs"])
        return 200, json.dumps(answer).encode()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(model: Path, **settings: Any) -> Iterator[TeacherServer]:
    """Serve a model from a thread."""
    server = TeacherServer(model, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.closed = True  # for the connections that are open
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    import transformers

    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("when", type=Path, help="File to wait for, with all imports done.")
    given = parser.parse_args()
    transformers.logging.disable_progress_bar()
    while not given.when.exists():
        time.sleep(0.02)
    TeacherServer(given.model, given.port, delay=0.01).serve_forever()
