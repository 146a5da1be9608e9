"""An OpenAI-compatible server: models, token ids, hidden states and prompt log-probabilities.

One prompt per request, since a serving engine makes batches of its own and a request is what is
sent again. A method sends once and raises `NoAnswerError` where asking again may help. How long to
wait is for the caller to decide, so no thread here sleeps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import urllib3

from ddk_cache.build.teacher import DTYPES
from ddk_cache.errors import CacheError, InputError, unknown
from ddk_cache.types import Array

CONNECT_SECONDS, READ_SECONDS = 10.0, 300.0
"""How long one request may take. A request also waits its turn in the server's queue."""

TEMPORARY = {408, 429, 500, 502, 503, 504}
"""Statuses of a server that is starting, overloaded or ill."""

ABSENT = {404, 405, 501}
"""Statuses of a call that a server does not have."""


class NoAnswerError(CacheError):
    """The server did not answer, or says that it cannot now; asking again may help."""


class NotOfferedError(InputError):
    """The server does not have this call."""


@dataclass
class Server:
    """One model of a server. Its methods may be used by many threads."""

    url: str
    """http://host:port"""
    model: str = ""
    """Its name on the server."""
    threads: int = 16
    """Connections to keep."""
    pool: urllib3.PoolManager = field(init=False)

    def __post_init__(self) -> None:
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
        self.url = self.url.rstrip("/").removesuffix("/v1")
        self.pool = urllib3.PoolManager(maxsize=self.threads, retries=False, timeout=timeout)

    def models(self) -> list[dict[str, Any]]:
        """Return what the server tells about its models.

        Raises:
            InputError: it is not such a server.
            NoAnswerError: it does not answer.
        """
        found: list[dict[str, Any]] = self._json("GET", "/v1/models")["data"]
        return found

    def choose(self, name: str | None) -> dict[str, Any]:
        """Use a model, by default the server's only one; return what the server tells about it.

        Raises:
            InputError: there is no such model, or a name is needed.
            NoAnswerError: the server does not answer.
        """
        known = {model["id"]: model for model in self.models()}
        if name is None and len(known) != 1:
            raise InputError(f"{self.url} serves {', '.join(known)}: name one with --model.")
        self.model = name or next(iter(known))
        if self.model not in known:
            raise InputError(f"{self.url}: {unknown('model', self.model, known)}")
        return known[self.model]

    def version(self) -> str:
        """Return the version of the server, or '' where it does not tell."""
        try:
            return str(self._json("GET", "/version")["version"])
        except (InputError, KeyError):
            return ""

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens, as the server makes them.

        Raises:
            NotOfferedError: the server does not tokenize.
            NoAnswerError: the server does not answer.
        """
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        found: list[int] = self._json("POST", "/tokenize", body)["tokens"]
        return found

    def hidden(self, tokens: list[int], size: int, dtype: str) -> torch.Tensor:
        """Return (S, H) float32 last hidden states of a prompt, after the final norm.

        `size` is the H to expect, `dtype` the type in which they are sent.

        Raises:
            NotOfferedError: the server does not return hidden states.
            InputError: it refuses the prompt, or its hidden states are of another size.
            NoAnswerError: the server does not answer.
        """
        body = {
            "model": self.model,
            "input": tokens,
            "task": "token_embed",
            "use_activation": False,
            "encoding_format": "bytes_only",
            "embed_dtype": dtype,
            "endianness": "little",
            "add_special_tokens": False,
        }
        data = self._send("POST", "/pooling", body)
        got = len(data) / DTYPES[dtype].itemsize / len(tokens)
        if got != size:
            raise InputError(
                f"{self.url}: got {got:,g} values of hidden state per token, expected {size:,}, "
                "the width of the head. Give the head of the model that is served (ddk-cache head "
                "MODEL OUT)."
            )
        flat = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype])
        return flat.float().reshape(len(tokens), size)

    def logprobs(self, tokens: list[int], k: int) -> Entries:
        """Return the k likeliest ids at each position of a prompt but the first.

        Raises:
            NotOfferedError: the server does not return prompt log-probabilities.
            InputError: it refuses the prompt, or so large a k.
            NoAnswerError: the server does not answer.
        """
        body = {
            "model": self.model,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
            "prompt_logprobs": k,
            "add_special_tokens": False,
        }
        choice = self._json("POST", "/v1/completions", body)["choices"][0]
        if not choice.get("prompt_logprobs"):
            raise NotOfferedError(f"{self.url} does not return prompt log-probabilities.")
        return parse(self.url, choice, tokens[1:], k)

    def _json(self, method: str, path: str, body: Any = None) -> Any:
        data = self._send(method, path, body)
        try:
            return json.loads(data)
        except ValueError:
            raise InputError(
                f"{self.url}{path}: got {data[:80]!r}, expected JSON. Check the address."
            ) from None

    def _send(self, method: str, path: str, body: Any = None) -> bytes:
        """Send one request and return the body of its answer."""
        where = f"{self.url}{path}"
        try:
            answer = self.pool.request(method, where, json=body)
        except urllib3.exceptions.LocationValueError as error:
            raise InputError(
                f"{self.url!r} is not an address: {error} Give http://host:port."
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise NoAnswerError(f"{self.url} does not answer: {reason(error)}") from error
        if answer.status < 300:
            return answer.data
        text = f"{where}: status {answer.status}, {message(answer.data)}"
        if answer.status in TEMPORARY:
            raise NoAnswerError(text)
        raise NotOfferedError(text) if answer.status in ABSENT else InputError(text)


@dataclass(frozen=True)
class Entries:
    """Log-probabilities of P positions of a prompt, in nats."""

    ids: Array
    """(P, k) int64, the likeliest first."""
    logprobs: Array
    """(P, k) float64"""
    label: Array
    """(P) float64, of the prompt's own next token."""
    greedy: tuple[int, float] | None
    """The likeliest token after the prompt and its log-probability, where the server tells."""


def parse(where: str, choice: dict[str, Any], labels: list[int], k: int) -> Entries:
    """Return what a completion tells of the P positions whose next tokens are `labels`.

    Each position has k entries, and one more where the label is not among them.

    Raises:
        InputError: entries are missing.
    """
    ids = np.empty((len(labels), k), np.int64)
    logprobs = np.empty((len(labels), k))
    label = np.empty(len(labels))
    told = choice["prompt_logprobs"][1:]
    if len(told) != len(labels):
        raise InputError(f"{where}: got {len(told)} positions, expected {len(labels)}.")
    for place, (entries, token) in enumerate(zip(told, labels, strict=True)):
        found = sorted((-entry["logprob"], int(name)) for name, entry in entries.items())
        if len(found) < k or str(token) not in entries:
            raise InputError(
                f"{where}: got {len(found)} log-probabilities at a position, expected {k} and that "
                "of the true next token. Use vLLM, or another server that gives them by token id."
            )
        logprobs[place], ids[place] = [-n for n, _ in found[:k]], [i for _, i in found[:k]]
        label[place] = entries[str(token)]["logprob"]
    return Entries(ids, logprobs, label, _greedy(choice))


def _greedy(choice: dict[str, Any]) -> tuple[int, float] | None:
    told = choice.get("logprobs") or {}
    name = str((told.get("tokens") or [""])[0]).removeprefix("token_id:")
    return (int(name), float(told["token_logprobs"][0])) if name.isdigit() else None


def reason(error: BaseException) -> str:
    """Return what a failed request tells, without the addresses of Python objects."""
    return str(error).split(">: ")[-1].split("): ")[-1]


def message(data: bytes) -> str:
    """Return what an error's body says."""
    try:
        body = json.loads(data)
    except ValueError:
        return data[:300].decode(errors="replace")
    if isinstance(body, dict):
        body = body.get("error") or body.get("detail") or body.get("message") or body
    if isinstance(body, dict):
        body = body.get("message") or body
    return str(body)[:300]
