"""The output head of a language model on its own: hidden states → logits.

It is for a teacher that only a serving engine can run: the engine returns hidden states, which are
small, and the head makes the full distribution of them here. Only the head's tensors are read from
a checkpoint, however large it is; their names come from the model built without weights. The price
is that a model which does more to its logits than a factor and a soft cap is not recognized here.
The check of a served teacher's answers is what finds it (`ddk_cache.served.teacher`).

A loaded model is taken apart by a hook on its head, which catches what the head gets and lets
nothing through, so that everything before it is the model's own. Model and head are compared once
on a few tokens (`why_whole`), with logits large enough to show a cap.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from ddk_cache import atomic
from ddk_cache.errors import InputError

FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Factors of the logits by their names in configurations, and their exponents (Cohere, Falcon H1,
Granite)."""

CAP = "final_logit_softcapping"
"""The soft cap by its name in configurations (Gemma)."""

FORMAT = "ddk-head-1"
"""What a head file calls itself in its metadata."""

PROBE_SIZE = 100.0
"""Size of the largest logit when model and head are compared; caps are near 30."""

PROBE_TOKENS = 8


def scale_and_cap(config: Any) -> tuple[float, float]:
    """Return the factor of the logits and their soft cap (0 for none) from a text configuration."""
    scale = 1.0
    for name, exponent in FACTORS.items():
        scale *= float(getattr(config, name, None) or 1.0) ** exponent
    return scale, float(getattr(config, CAP, None) or 0.0)


def finish(logits: torch.Tensor, scale: float, cap: float) -> torch.Tensor:
    """Return cap · tanh(scale · logits / cap), in place; 0 means no cap."""
    if scale != 1:
        logits *= scale
    if cap:
        logits.div_(cap).tanh_().mul_(cap)
    return logits


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: cap · tanh(scale · (h·Wᵀ + bias) / cap)."""

    weight: torch.Tensor
    """(V, H), W"""
    bias: torch.Tensor | None = None
    """(V)"""
    scale: float = 1.0
    cap: float = 0.0
    """0 means no cap."""

    @property
    def vocab_size(self) -> int:
        """Return V."""
        return len(self.weight)

    @property
    def hidden_size(self) -> int:
        """Return H."""
        return self.weight.shape[1]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (…, V) of hidden states (…, H), in the dtype of the weight."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return finish(logits, self.scale, self.cap)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Head:
        """Return the head on a device."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return replace(self, weight=self.weight.to(device, dtype), bias=bias)

    def hash(self) -> str:
        """Return a hash of tensors, as they were stored, and numbers."""
        found = xxhash.xxh3_128(f"{self.scale!r} {self.cap!r}".encode())
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
        return found.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the head as one safetensors file, whose metadata hold the numbers and the hash.

        Raises:
            InputError: the file cannot be written.
        """
        from safetensors.torch import save

        tensors = {"weight": self.weight.contiguous()}
        if self.bias is not None:
            tensors["bias"] = self.bias
        numbers = {"scale": repr(self.scale), "cap": repr(self.cap)}
        metadata = {"format": FORMAT, "hash": self.hash()} | numbers
        try:
            atomic.replace(Path(path), save(tensors, metadata))
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}. Give another path.") from error


def load_head(name: str | Path) -> Head:
    """Return a head from a file that `Head.save` wrote, or from a model's checkpoint.

    Raises:
        InputError: there is none, or it is damaged.
    """
    return _read_head(Path(name)) if Path(name).is_file() else extract_head(name)


def _read_head(path: Path) -> Head:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}.") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is not a head. Make one:  ddk-cache head MODEL {path}")
    head = Head(
        tensors["weight"],
        tensors.get("bias"),
        float(metadata["scale"]),
        float(metadata["cap"]),
    )
    if head.hash() != metadata["hash"]:
        raise InputError(f"{path} is damaged: its hash has changed. Make it again.")
    return head


def extract_head(
    name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> Head:
    """Return the head of a causal language model, reading nothing else of its checkpoint.

    `name` is a directory or hub id with safetensors files, `revision` a branch, tag or commit.

    Raises:
        InputError: there is no such model, or its head is not a linear layer of its checkpoint.
    """
    import transformers

    from ddk_cache.hf import load

    trust = {"trust_remote_code": trust_remote_code}
    config = load("model", "AutoConfig", name, revision=revision, **trust)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, **trust)
    except ValueError as error:
        raise InputError(f"{str(name)!r} is not a causal language model: {error}") from error
    linear = model.get_output_embeddings()
    if not isinstance(linear, torch.nn.Linear):
        raise InputError(f"the head of {str(name)!r} is not a linear layer.")
    config = config.get_text_config()
    tied = model.get_input_embeddings() if config.tie_word_embeddings else linear
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    weight = read_tensor(name, names[id(tied.weight)], revision)
    if linear.bias is None:
        return Head(weight, None, *scale_and_cap(config))
    bias = read_tensor(name, names[id(linear.bias)], revision)
    return Head(weight, bias, *scale_and_cap(config))


def read_tensor(name: str | Path, key: str, revision: str | None = None) -> torch.Tensor:
    """Return one tensor of a checkpoint.

    Its name may be longer or shorter at the front than `key`, as in models that wrap another, or be
    an old name of a head.

    Raises:
        InputError: the checkpoint has no such tensor, or no safetensors files.
    """
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    def file(filename: str) -> str | None:
        path: str | None = cached_file(
            str(name), filename, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        return path

    old = key.replace("lm_head.", "embed_out.")

    def matching(keys: list[str]) -> str | None:
        found = [k for k in keys if k in (key, old)] or [k for k in keys if key.endswith(f".{k}")]
        found = found or [k for k in keys if k.endswith(f".{key.removeprefix('model.')}")]
        return found[0] if len(found) == 1 else None

    if index := file("model.safetensors.index.json"):
        places = json.loads(Path(index).read_text())["weight_map"]
        found = matching(list(places))
        shard = file(places[found]) if found else None
    elif shard := file("model.safetensors"):
        with safe_open(shard, "pt") as tensors:
            found = matching(list(tensors.keys()))
    else:
        raise InputError(f"{str(name)!r} has no safetensors files, of which to read the head.")
    if not (found and shard):
        raise InputError(f"the checkpoint {str(name)!r} has no tensor {key!r}.")
    with safe_open(shard, "pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(found)
    return tensor


# --- a loaded model and its head ------------------------------------------------------------------


def head_input(model: Any, linear: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """Run a model up to its head `linear`; return what it gets (B, S, H), of the autocast dtype.

    `inputs` are `input_ids` (B, S) and, for rows of several documents, `position_ids` (B, S). The
    hook works behind any wrapper of the model, because the wrapper's own forward runs.
    """
    caught: list[torch.Tensor] = []

    def catch(_: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        hidden, device = given[0], given[0].device.type
        autocast = torch.is_autocast_enabled(device)
        caught.append(hidden.to(torch.get_autocast_dtype(device)) if autocast else hidden)
        return (hidden[:, :0],)

    with linear.register_forward_pre_hook(catch):
        model(**inputs, use_cache=False)
    (hidden_BSH,) = caught
    return hidden_BSH


def why_whole(
    model: Any,
    linear: torch.nn.Module,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    device: torch.device,
) -> str | None:
    """Return why only a model's own logits will do, or None where `head` gives the same.

    `linear` is the model's output projection, `head` (B, S, H) → (B, S, V) what is to replace it
    and all that follows, and `device` that of the model's tokens.
    """
    kind = type(model).__name__
    tokens = torch.arange(1, 1 + PROBE_TOKENS, device=device)[None] % vocab_size
    try:
        error = _difference(model, linear, head, vocab_size, tokens)
    except (ValueError, RuntimeError, IndexError, TypeError, AttributeError) as found:
        return f"the head of {kind} cannot be applied apart ({found})."
    if error > 1e-3:
        return f"{kind} changes its logits after its head in an unknown way (off by {error:.2g})."
    return None


def _difference(
    model: Any,
    linear: torch.nn.Module,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    tokens_BS: torch.Tensor,
) -> float:
    """Return the largest error of a head, relative to the largest logit of the model.

    Rounding to the type of its logits is not an error.
    """
    hidden = head_input(model, linear, input_ids=tokens_BS)
    factor = PROBE_SIZE / linear(hidden).abs().amax().clamp_min(1e-6)
    with linear.register_forward_pre_hook(lambda _, given: (given[0] * factor,)):
        expected = model(input_ids=tokens_BS, use_cache=False).logits
    got = head(hidden * factor)
    if got.shape != (*tokens_BS.shape, vocab_size) or got.shape != expected.shape:
        return torch.inf
    off = (got.float() - expected.float().to(got.device)).abs().amax()
    rounding = 2 * torch.finfo(got.dtype).eps
    return max(0.0, float(off / expected.float().abs().amax()) - rounding)
