"""A teacher that a serving engine runs: targets from hidden states, or from log-probabilities.

With a head (`ddk_cache.head`) the server returns the last hidden state of every token, and the full
distribution is made here: targets of any kind, exact, for 2 or 4 bytes per hidden value on the
wire. Without one it returns the log-probabilities of its K likeliest ids: any server of that call
will do, but they give top-k targets only, with the mass outside known as 1 − Σ, and take several
times the bytes and time.

A row is one prompt, and many are in flight. A server that stops answering is waited for; what it
answers is checked once on a text before the build begins, because a wrong head, tokenizer or model
raises no error by itself. An engine does not promise equal bits, so two builds of one identity
agree to rounding only.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ddk_cache.build.targets import Scores, extract_hidden
from ddk_cache.build.teacher import DTYPES, Call, Teacher
from ddk_cache.errors import CacheError, InputError, unknown
from ddk_cache.format.spec import TargetSpec
from ddk_cache.head import Head, load_head
from ddk_cache.hf import load, load_tokenizer, pick_device
from ddk_cache.models.config import TeacherConfig
from ddk_cache.models.load import load_teacher
from ddk_cache.served.check import check_hidden, check_logprobs, probe_tokens
from ddk_cache.served.server import Entries, NoAnswerError, NotOfferedError, Server

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

IN_FLIGHT = 16
"""Requests at a time: enough for an engine to fill its batches of tokens."""

BATCH_ROWS = 32
"""Rows of one call: during its last rows the server idles, and after it a lease is renewed."""

PATIENCE = 600.0
"""Seconds to wait for a server that stopped answering: enough to load a large model again."""

LONGEST_PAUSE = 30.0
"""Seconds between two attempts, at most; the first is repeated at once, then after 1, 2, 4, …"""

START = {
    "hidden states": "Start vLLM with --runner pooling --convert embed --pooler-config "
    """'{"task": "token_embed", "use_activation": false}', or leave out --head.""",
    "log-probabilities": "Give --head, if the server returns hidden states.",
}
"""What to do where a server does not have the call that was chosen."""


def find_teacher(
    name: str,
    tokenizer: str | None,
    targets: str,
    config: TeacherConfig,
    *,
    model: str | None = None,
    head: str | None = None,
    vocab_size: int | None = None,
) -> tuple[Teacher, Any]:
    """Return a teacher by directory, GGUF file, hub id or address, and its tokenizer.

    `model`, `head` and `vocab_size` are those of `load_served`.

    Raises:
        InputError: there is no such teacher or tokenizer, or the options do not belong together.
    """
    trust = config.trust_remote_code
    if "://" not in name:
        if model or head:
            raise InputError("--model and --head are for a --teacher that is an http:// address.")
        revision = None if tokenizer else config.revision
        words = load_tokenizer(tokenizer or name, trust_remote_code=trust, revision=revision)
        return load_teacher(name, config), words
    plain = TeacherConfig(dtype=config.dtype, device=config.device, trust_remote_code=trust)
    if config != plain:
        changed = [name for name, value in vars(config).items() if value != getattr(plain, name)]
        options = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise InputError(f"{name} is a server, which loads its model itself. Leave out {options}.")
    if tokenizer is None and head and Path(head).is_dir():
        tokenizer = head
    if tokenizer is None:
        raise InputError(f"{name} is a server: give the --tokenizer of its model.")
    words = load_tokenizer(tokenizer, trust_remote_code=trust)
    how: dict[str, Any] = {"dtype": config.dtype, "device": config.device}
    how |= {"targets": TargetSpec.parse(targets), "vocab_size": vocab_size}
    return load_served(name, words, model=model, head=head, **how), words


def load_served(
    url: str,
    tokenizer: Any,
    *,
    model: str | None = None,
    head: str | Path | None = None,
    targets: TargetSpec,
    vocab_size: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    patience: float = PATIENCE,
) -> Teacher:
    """Return the teacher that a server runs, once its answers are checked.

    Args:
        url: http://host:port of an OpenAI-compatible server.
        tokenizer: The teacher's tokenizer.
        model: Its name on the server; by default the only one.
        head: A head file or checkpoint: hidden states are used. Without it, log-probabilities are.
        targets: What will be asked for.
        vocab_size: Number of the model's outputs, if known. With a head it is the head's; without,
            by default, that of the configuration beside the tokenizer, or the tokenizer's own.
        dtype: What the server computes in, if known. It becomes part of the identity, and hidden
            states are sent in it.
        device: Where the head is applied.
        patience: Seconds to wait for a server that stops answering.

    Raises:
        InputError: there is no such server, model, head, dtype or device, the server cannot give
            these targets, or answers, head and tokenizer do not belong together.
    """
    if dtype not in (*DTYPES, "auto"):
        raise InputError(unknown("dtype", dtype, [*DTYPES, "auto"]))
    server, target = Server(url, threads=IN_FLIGHT), pick_device(device)
    try:
        told = server.choose(model)
        found: dict[str, Any] = {
            "name": f"{server.model} at {server.url}, {told.get('owned_by')} {server.version()}",
            "identity": {
                "class": "served",
                "engine": str(told.get("owned_by", "unknown")),
                "model": server.model,
            }
            | ({} if dtype == "auto" else {"dtype": dtype}),
            "device": target,
            "positions": told.get("max_model_len"),
            "batch_rows": BATCH_ROWS,
            "takes_positions": True,
            "server": server,
            "patience": patience,
        }
        tokens = probe_tokens(server, tokenizer, found["positions"])
        if head is not None:
            return _hidden_teacher(found, load_head(head), dtype, tokens)
        return _logprob_teacher(found, vocab_size or outputs(tokenizer), targets, tokens)
    except NoAnswerError as error:
        raise InputError(f"{error}. Start the server, or give its address.") from error
    except NotOfferedError as error:
        way = "log-probabilities" if head is None else "hidden states"
        raise InputError(f"{server.url} does not return {way} ({error}). {START[way]}") from error


def _hidden_teacher(
    found: dict[str, Any], head: Head, dtype: str, tokens: list[int]
) -> HiddenTeacher:
    found["identity"] |= {"answers": "hidden states", "head": head.hash()}
    head, wire = head.to(found["device"]), "float32" if dtype == "auto" else dtype
    check_hidden(found["server"], head, wire, tokens)

    def logits(tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None = None) -> torch.Tensor:
        rows = teacher.hidden(tokens_BS, positions_BS)
        return torch.stack([head.logits(hidden) for hidden in rows])

    teacher = HiddenTeacher(logits, head.vocab_size, **found, head=head, wire=wire)
    return teacher


def _logprob_teacher(
    found: dict[str, Any], vocab_size: int, targets: TargetSpec, tokens: list[int]
) -> LogprobTeacher:
    _require_topk(found["server"], targets, ())
    found["identity"] |= {"answers": "log-probabilities"}
    found["positions"] = found["positions"] and found["positions"] - 2
    check_logprobs(found["server"], tokens, targets.size, vocab_size)

    def logits(_: torch.Tensor) -> torch.Tensor:
        raise InputError(f"{found['name']} has no logits, only those of its likeliest ids.")

    return LogprobTeacher(logits, vocab_size, **found)


def outputs(tokenizer: Any) -> int:
    """Return how many ids a model has: by the configuration beside its tokenizer, if there is one.

    A head is often wider than its tokenizer.
    """
    width = 1 + int(max(tokenizer.get_vocab().values()))
    if not tokenizer.name_or_path:
        return width
    try:
        config = load("model", "AutoConfig", tokenizer.name_or_path)
    except InputError:
        return width
    return max(width, int(config.get_text_config().vocab_size))


# --- the two teachers -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HiddenTeacher(Teacher):
    """A served teacher whose head is applied here, a row as it comes, in chunks of positions."""

    server: Server
    head: Head
    wire: str
    """Type of hidden states as they are sent."""
    patience: float

    def require_isolation(self) -> None:
        """Do nothing: each document is a prompt of its own."""

    def hidden(
        self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """Return the (S, H) hidden states of each row, in order."""

        def ask(tokens: list[int]) -> torch.Tensor:
            return self.server.hidden(tokens, self.head.hidden_size, self.wire)

        prompts = documents_of(tokens_BS, positions_BS)
        answers = ask_all(ask, list(itertools.chain(*prompts)), self.patience)
        for documents in prompts:
            yield torch.cat([next(answers) for _ in documents]).to(self.device)

    def scores(self, call: Call) -> tuple[Scores, torch.Tensor | None]:
        """Return the targets of B rows, and the logits (B, V) of one position of each row."""
        rows, at = [], []
        for row, hidden in enumerate(self.hidden(call.tokens[:, :-1], call.positions)):
            rows.append(
                extract_hidden(
                    hidden[None],
                    self.head.logits,
                    call.tokens[row : row + 1, 1:],
                    call.targets,
                    vocab_size=self.vocab_size,
                    temperatures=call.temperatures,
                    offsets_BS=call.offsets[row : row + 1],
                )
            )
            at.append(hidden[call.chosen[row]])
        scores = Scores(*(torch.cat(part) for part in zip(*rows, strict=True)))
        return scores, self.head.logits(torch.stack(at))


@dataclass(frozen=True, kw_only=True)
class LogprobTeacher(Teacher):
    """A served teacher of which only the log-probabilities of its likeliest ids are known."""

    server: Server
    patience: float

    def require_isolation(self) -> None:
        """Do nothing: each document is a prompt of its own."""

    def scores(self, call: Call) -> tuple[Scores, torch.Tensor | None]:
        """Return the top-k targets of B rows, and no logits.

        Raises:
            InputError: other targets are asked for, or mass at other temperatures.
        """
        _require_topk(self.server, call.targets, call.temperatures)
        k = call.targets.size

        def ask(tokens: list[int]) -> Entries:
            return self.server.logprobs(tokens, k)

        prompts = documents_of(call.tokens, call.positions)
        asked = [tokens for tokens in itertools.chain(*prompts) if len(tokens) > 1]
        found = ask_all(ask, asked, self.patience)
        answers = [row_of(documents, found, k) for documents in prompts]
        ids_BSK = torch.from_numpy(np.stack([answer.ids for answer in answers]))
        if (largest := int(ids_BSK.max())) >= self.vocab_size:
            raise InputError(
                f"{self.server.url}: got token id {largest:,}, expected ids below "
                f"{self.vocab_size:,}. Give as --tokenizer the directory of the model that is "
                "served, with its config.json."
            )
        logprobs_BSK = torch.from_numpy(np.stack([answer.logprobs for answer in answers]))
        label_BS = torch.from_numpy(np.stack([answer.label for answer in answers]))
        tail_BS = (1 - logprobs_BSK.exp().sum(-1)).clamp(min=0).log()
        none = tail_BS.new_empty(*tail_BS.shape, 0)
        floats = (part.float() for part in (logprobs_BSK, tail_BS, label_BS, none))
        return Scores(ids_BSK, *floats), None


def _require_topk(server: Server, targets: TargetSpec, temperatures: tuple[float, ...]) -> None:
    if targets.kind != "topk" or temperatures:
        raise InputError(
            f"targets: got {targets}{' with temperatures' if temperatures else ''}, expected "
            f"topk:K, since log-probabilities of {server.url} are known for the likeliest ids "
            "only. Give --targets topk:K, or --head to use hidden states."
        )


# --- many requests --------------------------------------------------------------------------------


def documents_of(
    tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None
) -> list[list[list[int]]]:
    """Return the documents of each row, one where there are no positions.

    Tokens beyond the last position belong to the last document.
    """
    if positions_BS is None:
        return [[tokens] for tokens in tokens_BS.tolist()]
    return [
        [part.tolist() for part in np.split(tokens, np.flatnonzero(positions == 0)[1:])]
        for tokens, positions in zip(
            tokens_BS.cpu().numpy(), positions_BS.cpu().numpy(), strict=True
        )
    ]


def row_of(documents: list[list[int]], answers: Iterator[Entries], k: int) -> Entries:
    """Put the entries (S, K) of a row together, from the answers to its documents in order.

    A document of one token has no answer. The first token of a document is not predicted: entries
    for it say nothing.
    """
    ends = np.cumsum([len(tokens) for tokens in documents])
    size = int(ends[-1]) - 1
    ids = np.tile(np.arange(k), (size, 1))
    logprobs, label = np.full((size, k), -np.log(k)), np.zeros(size)
    for tokens, end in zip(documents, ends.tolist(), strict=True):
        if len(tokens) > 1:
            found, part = next(answers), slice(end - len(tokens), end - 1)
            ids[part], logprobs[part], label[part] = found.ids, found.logprobs, found.label
    return Entries(ids, logprobs, label, None)


def ask_all(
    ask: Callable[[list[int]], Answer], prompts: list[list[int]], patience: float
) -> Iterator[Answer]:
    """Return the answers to prompts in order, `IN_FLIGHT` of them at a time.

    Raises:
        CacheError: the server did not answer for `patience` seconds.
    """
    pool = ThreadPoolExecutor(IN_FLIGHT)
    try:
        futures = [pool.submit(ask, prompt) for prompt in prompts]
        for prompt, future in zip(prompts, futures, strict=True):
            yield _wait(future, partial(pool.submit, ask, prompt), patience)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _wait(future: Future[Answer], again: Callable[[], Future[Answer]], patience: float) -> Answer:
    """Return the answer of a request, sent again, with growing pauses, while there is none."""
    began, pause = time.monotonic(), 0.0
    while True:
        try:
            answer = future.result()
        except NoAnswerError as error:
            if pause == 1:
                log.warning("%s; waiting up to %.0f s for it", error, patience)
            if time.monotonic() + pause > began + patience:
                raise CacheError(
                    f"{error}, and did not for {patience:.0f} s. Start the server again and run "
                    "the same command: the build resumes where it stopped."
                ) from error
            time.sleep(pause)
            future, pause = again(), min(max(1.0, 2 * pause), LONGEST_PAUSE)
        else:
            if pause > 1:
                log.warning("the server answers again, after %.0f s", time.monotonic() - began)
            return answer
