"""A model that answers prompts: batched sampling with a key-value cache, and its log-probabilities.

The loop is our own, forty lines, because every number of it must be reproducible: each token is
the value of the inverse distribution function at one number of `ddk_cache.rng`, keyed by the seed,
the prompt and the number of the sample. A generator of a library would make a response depend on
those before it. A response that ends leaves the batch at once. The price: no beams, and none of
the fast paths of a serving engine.

Shape letters: B responses, S positions, V vocabulary, N most new tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddk_cache.errors import InputError
from ddk_cache.models.config import TeacherConfig
from ddk_cache.models.load import identify, load_placed
from ddk_cache.rng import uniform
from ddk_cache.sequences.config import SamplingConfig
from ddk_cache.types import Array


@dataclass(frozen=True)
class Responder:
    """A causal language model that writes responses, and its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    identity: Mapping[str, str]
    """Hashes by content; two models with equal identities give equal responses."""
    device: torch.device
    stops: frozenset[int]
    """Ids that end a response."""

    @property
    def positions(self) -> int | None:
        """Return the longest sequence that the model was made for, where there is such a limit."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found if found is None else int(found)


@dataclass(frozen=True)
class Response:
    """The tokens that a model wrote."""

    ids: tuple[int, ...]
    """With the token that ended it."""
    logprob: float
    """Σ log p of its tokens, nats: over the full vocabulary at temperature 1."""
    ended: str
    """`stop`, or `length` where the most new tokens were reached."""


def load_responder(
    name: str | Path,
    tokenizer: Any,
    config: TeacherConfig = TeacherConfig(),  # noqa: B008 (it is frozen)
) -> Responder:
    """Load a causal language model from a directory or the hub, for writing responses.

    Raises:
        InputError: there is no such model, dtype or device, weights are missing, or the model has
            fewer outputs than the tokenizer has tokens.
    """
    if config.tensor_parallel > 1:
        raise InputError(
            "--tensor-parallel: a model that writes responses runs in one process. Leave it out."
        )
    model, device, quantization = load_placed(name, config)
    width, outputs = len(tokenizer), model.config.get_text_config().vocab_size
    if width > outputs:
        raise InputError(
            f"the model {str(name)!r} has {outputs:,} outputs and the tokenizer {width:,} tokens: "
            "they do not belong together. Give --tokenizer, or a model of this tokenizer."
        )
    named = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id} | set(named if isinstance(named, list) else [named])
    stops = frozenset(ends - {None})
    identity = identify(model, quantization)
    return Responder(model, tokenizer, str(name), identity, device, stops)


@torch.inference_mode()
def respond(
    responder: Responder,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    config: SamplingConfig,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Response]:
    """Return the response to each of B prompts, whose random numbers follow from its key.

    `advance` is called after each step with the number of tokens that it wrote.

    The last bits of the logits depend on the batch: the same prompts in the same order give the
    same responses.
    """
    model, device, N = responder.model, responder.device, config.max_new_tokens
    numbers = np.arange(N, dtype=np.uint64)
    chance_BN = torch.from_numpy(np.stack([uniform(numbers, key) for key in keys])).to(device)
    ids_BS, mask_BS = (tensor.to(device) for tensor in left_padded(prompts))
    place_B1 = mask_BS.sum(1, keepdim=True)
    position_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    written: list[list[int]] = [[] for _ in prompts]
    logprob_B = np.zeros(len(prompts))
    going, cache = torch.arange(len(prompts), device=device), None
    more: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        more["logits_to_keep"] = 1  # else the logits of whole prompts would be made
    for step in range(N):
        out = model(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            position_ids=position_BS,
            past_key_values=cache,
            **more,
        )
        cache, logits_BV = out.past_key_values, out.logits[:, -1].float()
        logq_BV = logits_BV.log_softmax(-1)
        logits_BV[:, len(responder.tokenizer) :] = -torch.inf  # a head may be padded
        chosen_B = choose(logits_BV, chance_BN[:, step], config.temperature, config.top_p)
        found_B = logq_BV.gather(1, chosen_B[:, None])[:, 0]
        chosen = chosen_B.tolist()
        for number, token, value in zip(going.tolist(), chosen, found_B.tolist(), strict=True):
            written[number].append(token)
            logprob_B[number] += value
        advance(len(chosen))
        kept = [n for n, token in enumerate(chosen) if token not in responder.stops]
        if not kept:
            break
        ids_BS, position_BS = chosen_B[:, None], place_B1 + step
        mask_BS = torch.cat([mask_BS, torch.ones_like(mask_BS[:, :1])], 1)
        if len(kept) < len(chosen):
            stay = torch.tensor(kept, device=device)
            cache.batch_select_indices(stay)
            ids_BS, position_BS, mask_BS = ids_BS[stay], position_BS[stay], mask_BS[stay]
            going, place_B1, chance_BN = going[stay], place_B1[stay], chance_BN[stay]
    return [
        Response(tuple(ids), float(value), "stop" if ids[-1] in responder.stops else "length")
        for ids, value in zip(written, logprob_B, strict=True)
    ]


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, S) ids that end at the same place, and the (B, S) mask of what is no padding."""
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int64)
    mask: Array = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def choose(
    logits_BV: torch.Tensor, chance_B: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """Return (B) ids: the values of the inverse distribution function at (B) numbers in [0, 1).

    With `top_p` below 1 the distribution is that of the fewest likeliest ids that together have
    at least that probability (nucleus sampling; Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    p_BV = (logits_BV / temperature).softmax(-1)
    ids_BV = None
    if top_p < 1:
        p_BV, ids_BV = p_BV.sort(stable=True, dim=-1, descending=True)
        p_BV = p_BV.where(p_BV.cumsum(-1) - p_BV < top_p, 0.0)
    sums_BV = p_BV.cumsum(-1, dtype=torch.float64)
    wanted_B1 = (chance_B * sums_BV[:, -1])[:, None].minimum(
        sums_BV[:, -1:].nextafter(torch.zeros_like(sums_BV[:, -1:]))
    )
    place_B1 = torch.searchsorted(sums_BV, wanted_B1, right=True)
    return (place_B1 if ids_BV is None else ids_BV.gather(1, place_B1))[:, 0]
