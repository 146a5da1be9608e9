"""Whether a server, a tokenizer and a head belong together, seen from its answers on one text.

A wrong head, scale or tokenizer raises no error by itself: it gives other numbers. So a short text
is scored before a build begins, twice and, where the server offers it, in both ways.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch

from ddk_cache.errors import InputError
from ddk_cache.head import Head
from ddk_cache.served.server import NotOfferedError, Server

log = logging.getLogger(__name__)

AGREEMENT = 0.1
"""Nats by which two log-probabilities of one token may differ, in the mean over a text. An engine's
bfloat16 is off by 0.07; a wrong head, scale or tokenizer by several nats."""

PROBE = """The river rose in the night and by morning the lower fields were under water. Nobody was
surprised: it had rained for six days, and the old people of the village had said from the first
that the banks would not hold. They moved the animals to the hill and waited for the weather."""
"""The text on which a server's answers are checked."""


def probe_tokens(server: Server, tokenizer: Any, positions: int | None) -> list[int]:
    """Return the tokens of `PROBE`.

    Raises:
        InputError: the server's tokenizer gives other ids.
    """
    tokens: list[int] = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    try:
        theirs = server.tokenize(PROBE)
    except InputError:
        log.info("%s: its tokenizer could not be compared", server.url)
    else:
        if theirs != tokens:
            raise InputError(
                f"{server.url}: the tokenizer of {server.model!r} gives other ids than the one "
                "that was given here. Give the --tokenizer of the model that is served."
            )
    return tokens[: positions and positions - 2]


def check_hidden(server: Server, head: Head, wire: str, tokens: list[int]) -> None:
    """Compare two answers, a guess at random and, where the server has them, log-probabilities.

    Raises:
        InputError: they do not agree.
    """
    labels = torch.tensor(tokens[1:])

    def label() -> torch.Tensor:
        hidden = server.hidden(tokens[:-1], head.hidden_size, wire)
        if ((hidden.norm(dim=-1) - 1).abs() < 1e-2).all():
            raise InputError(
                f"{server.url}: got hidden states of norm 1, which tell nothing of logits. Start "
                "the server with use_activation false in its pooler config."
            )
        logits = head.logits(hidden.to(head.weight.device)).cpu()
        return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]

    first = label()
    _agree(server, "two answers to one prompt", first, label())
    try:
        theirs = torch.from_numpy(server.logprobs(tokens, 1).label)
    except InputError:
        log.info("%s: it has no log-probabilities with which to compare the head", server.url)
    else:
        _agree(server, "log-probabilities with this head and the server's own", first, theirs)
    _better_than_chance(server, first, head.vocab_size)


def check_logprobs(server: Server, tokens: list[int], k: int, vocab_size: int) -> None:
    """Compare two answers, of which the second has the token that the first one gives.

    Raises:
        InputError: they do not agree, or the server does not give so many.
    """
    try:
        first = server.logprobs(tokens, k)
    except NotOfferedError:
        raise
    except InputError as error:
        raise InputError(
            f"{error} (asked for {k} log-probabilities per token). Give a smaller --targets "
            "topk:K, or start the server with a larger --max-logprobs."
        ) from error
    if first.greedy:
        token, logprob = first.greedy
        label = server.logprobs([*tokens, token], k).label
        _agree(server, "two answers to one prompt", first.label, label[:-1])
        _agree(server, "a token when generated and when read", [logprob], label[-1:])
    _better_than_chance(server, first.label, vocab_size)


def _agree(server: Server, what: str, one: Any, other: Any) -> None:
    off = np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64))
    log.info("%s: %s differ by %.1e nats (at most %.1e)", server.url, what, off.mean(), off.max())
    if not off.mean() <= AGREEMENT:
        raise InputError(
            f"{server.url}: {what} differ by {off.mean():.2g} nats per token, expected at most "
            f"{AGREEMENT}. Check that model and head are of one checkpoint."
        )


def _better_than_chance(server: Server, label: Any, vocab_size: int) -> None:
    loss, chance = -float(np.mean(np.asarray(label))), math.log(vocab_size)
    log.info("%s: %.2f nats per token on a text in English", server.url, loss)
    if not loss <= chance + 1:
        raise InputError(
            f"{server.url}: {server.model!r} gives {loss:.1f} nats per token on plain English, "
            f"where guessing gives {chance:.1f}. Give the head and tokenizer of the model that is "
            "served."
        )
