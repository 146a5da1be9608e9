"""Models and tokenizers from a directory or the hub, tokenizer hashes, and devices.

A cache keeps the tokenizer's own files, so that a student can be trained and saved where neither
the teacher nor the hub can be reached. Three hashes identify it instead of one: two tokenizers
that give every id the same string are interchangeable for a student that reads stored ids, even
where their chat templates or added defaults differ, and refusing those would refuse the base and
the chat model of one family.

Code that comes with a model runs only where the caller says so: left open, transformers would ask
on stdin. A hub that does not answer is asked once, for a few seconds; the price is one request.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from ddk_cache.errors import InputError, unknown
from ddk_cache.hashing import canonical, digest

HUB_SECONDS = 5.0
"""Seconds in which the hub must answer; else only downloaded files are used."""


def load(
    what: str, auto: str, name: str | Path, *, trust_remote_code: bool = False, **options: Any
) -> Any:
    """Return `transformers.<auto>.from_pretrained(name, **options)`.

    `what` is what a message calls it. Raises InputError where it cannot be loaded.
    """
    import transformers

    path = Path(name).expanduser()
    if str(name) and path.exists():
        source, offline = str(path), False
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        raise InputError(f"there is no {what} at {name}.")
    else:
        source, offline = str(name), _offline(str(name))
    transformers.utils.logging.disable_progress_bar()  # it would break into our own
    try:
        return getattr(transformers, auto).from_pretrained(
            source, trust_remote_code=trust_remote_code, local_files_only=offline, **options
        )
    except Exception as error:  # transformers raises many kinds for one cause: it is not there
        reason = textwrap.shorten(str(error), 300)
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own, which runs only with --trust-remote-code."
        elif offline:
            reason = (
                "there is no such directory, the hub does not answer, and it was not downloaded "
                "before. Give a directory, or connect to the hub."
            )
        raise InputError(f"no {what} could be loaded from {str(name)!r}: {reason}") from error


def _offline(name: str) -> bool:
    """Return whether the hub cannot be asked about a model."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_SECONDS)
    except huggingface_hub.errors.HfHubHTTPError:
        return False  # it answered; what it says against this model, loading will repeat
    except Exception:  # whatever its HTTP client raises; HF_HUB_OFFLINE raises too
        return True
    return False


def locate(name: str | Path) -> tuple[str | Path, dict[str, Any]]:
    """Return where a model is, and the options of `from_pretrained` that a GGUF file needs."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path.parent, {"gguf_file": path.name}
    return name, {}


def load_model(what: str, name: str | Path, **options: Any) -> Any:
    """Load a causal language model with all of its weights.

    Raises:
        InputError: there is none, or weights are missing, which transformers would make up.
    """
    model, found = load(what, "AutoModelForCausalLM", name, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"the {what} {str(name)!r} lacks weights of its model: {', '.join(missing[:3])}{more}. "
            "Give a complete checkpoint of a causal language model."
        )
    return model


def load_tokenizer(
    name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """Load a tokenizer of a directory, a GGUF file or the hub.

    Raises:
        InputError: there is none, or it has no end-of-text token.
    """
    place, options = locate(name)
    given: dict[str, Any] = options | ({"revision": revision} if revision else {})
    trust = {"trust_remote_code": trust_remote_code}
    tokenizer = load("tokenizer", "AutoTokenizer", place, **trust, **given)
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer {str(name)!r} has no end-of-text (eos) token to put between documents."
        )
    return tokenizer


def identify_tokenizer(tokenizer: Any) -> dict[str, str]:
    """Return content hashes of a tokenizer.

    `vocabulary` covers which string every id stands for, `encoding` how text becomes ids and
    which ids are special, `chat_template` how messages become text; a tokenizer may have several
    templates by name.
    """
    template = tokenizer.chat_template or ""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "vocabulary": digest(canonical(vocabulary)),
        "encoding": digest(canonical([backend.to_str() if backend else vocabulary, special])),
        "chat_template": digest(
            template.encode() if isinstance(template, str) else canonical(template)
        ),
    }


def pick_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is CUDA where there is one, else the CPU.

    Where a launcher sets LOCAL_RANK, `auto` spreads the processes of a machine over its GPUs.

    Raises:
        InputError: no such device is known or present.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = os.environ.get("LOCAL_RANK", "")
        if not rank.isdecimal():
            return torch.device("cuda")
        return torch.device("cuda", int(rank) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(unknown("device", name, ["auto", "cpu", "cuda"])) from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):  # by kind of device
        raise InputError(f"device {name!r}: torch cannot use it here. Give another.") from None
    return device


def hash_weights(model: torch.nn.Module) -> str:
    """Return a content hash of all weights of a model, by name, wherever they are.

    Weights that are offloaded or spread among processes give the hash that they have as a whole;
    in the latter case all processes must call this. Quantized ones are hashed as they are stored.
    """
    state = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _plain(model, name, tensor):
            state.update(part.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return state.hexdigest()


def _plain(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the ordinary tensors that a tensor of a model consists of."""
    if tensor.is_meta:  # accelerate has it, and brings it for a forward pass
        from accelerate.utils import align_module_device

        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module):
            yield getattr(module, parameter).detach()
    elif hasattr(tensor, "full_tensor"):  # a DTensor
        yield tensor.full_tensor()
    elif hasattr(tensor, "__tensor_flatten__"):  # of torchao
        for part in tensor.__tensor_flatten__()[0]:
            if (inner := getattr(tensor, part)) is not None:
                yield from _plain(model, name, inner)
    else:
        yield tensor
