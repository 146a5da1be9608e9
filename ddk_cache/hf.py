"""Models and tokenizers from a directory or the hub, and which tokenizer it is, by content.

A cache keeps the tokenizer's own files, so that a student can be trained and saved where neither
the teacher nor the hub can be reached. Three hashes identify it instead of one: two tokenizers
that give every id the same string are interchangeable for a student that reads stored ids, even
where their chat templates or added defaults differ, and refusing those would refuse the base and
the chat model of one family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ddk_cache.errors import InputError, unknown
from ddk_cache.hashing import canonical, digest


def load(what: str, auto: str, name: str | Path, **options: Any) -> Any:
    """Return `transformers.<auto>.from_pretrained(name, **options)`.

    `what` is what a message calls it. Raises InputError where it cannot be loaded.
    """
    import transformers

    if Path(name).is_absolute() and not Path(name).exists():
        raise InputError(f"there is no {what} at {name}.")
    transformers.utils.logging.disable_progress_bar()  # it would break into our own
    try:
        # Without an explicit False, transformers would ask on the terminal and wait.
        options = {"trust_remote_code": False} | options
        return getattr(transformers, auto).from_pretrained(str(name), **options)
    except Exception as error:  # transformers raises many kinds for one cause: it is not there
        raise InputError(f"no {what} could be loaded from {str(name)!r}: {error}") from error


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer. Raises InputError where there is none, or it has no end-of-text token."""
    tokenizer = load("tokenizer", "AutoTokenizer", name, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer {str(name)!r} has no end-of-text (eos) token to put between documents."
        )
    return tokenizer


def identify_tokenizer(tokenizer: Any) -> dict[str, str]:
    """Return content hashes of a tokenizer.

    `vocabulary` covers which string every id stands for, `encoding` how text becomes ids and
    which ids are special, `chat_template` how messages become text.
    """
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "vocabulary": digest(canonical(vocabulary)),
        "encoding": digest(canonical([backend.to_str() if backend else vocabulary, special])),
        "chat_template": digest((tokenizer.chat_template or "").encode()),
    }


def pick_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        InputError: no such device is known or present.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(unknown("device", name, ["auto", "cpu", "cuda"])) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} was asked for, but torch sees no CUDA device here.")
    return device
