"""The tokenizer of a cache: loading it, and saying by content which one it is.

A cache keeps the tokenizer's own files, so that a student can be trained and saved where neither
the teacher nor the hub can be reached. Three hashes identify it instead of one: two tokenizers
that give every id the same string are interchangeable for a student that reads stored ids, even
where their chat templates or added defaults differ, and refusing those would refuse the base and
the chat model of one family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk_cache.schema import InputError, canonical, digest


def load_tokenizer(name: str | Path) -> Any:
    """Load a transformers tokenizer from a directory or the hub.

    Raises:
        InputError: it does not exist, cannot be read, or has no end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except Exception as error:  # transformers raises many kinds for one cause: it is not there
        raise InputError(f"no tokenizer could be loaded from {str(name)!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer {str(name)!r} has no end-of-text (eos) token to put between documents."
        )
    return tokenizer


def identify(tokenizer: Any) -> dict[str, str]:
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
