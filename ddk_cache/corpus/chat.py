"""A conversation → tokens, with the assistant's marked."""

from __future__ import annotations

import re
from typing import Any

from ddk_cache.errors import InputError

Encoded = tuple[list[int], list[bool]]
"""The tokens of a document, and for each whether it is a label that the loss counts."""


def encode_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> Encoded:
    """Tokenise a conversation by the tokenizer's chat template and mark the assistant's tokens.

    A template with `{% generation %}` marks them itself. For any other, the assistant's part of
    the text is what each of its messages adds to the conversation before it.

    Raises:
        InputError: there is no template, it refuses the messages, or it rewrites earlier turns,
            so that it cannot be said what the assistant added.
    """
    if not tokenizer.chat_template:
        raise InputError("the corpus holds 'messages', but the tokenizer has no chat template.")
    try:
        if re.search(r"{%-?\s*generation\s*-?%}", tokenizer.chat_template):
            out = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]
        text, spans = _spans(tokenizer, messages)
    except InputError:
        raise
    except Exception as error:  # jinja2 raises whatever the template asks for
        raise InputError(f"the chat template refuses a conversation: {error}") from error
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spoken = [
        any(begin <= first < end for begin, end in spans) for first, _ in out["offset_mapping"]
    ]
    return out["input_ids"], spoken


def _spans(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation; return its text and where in it the assistant speaks."""

    def render(upto: int, ask: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:upto], tokenize=False, add_generation_prompt=ask
            )
        )

    text, spans = render(len(messages)), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(index, ask=True) if index else ""
        upto = render(index + 1)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise InputError(
                "the chat template rewrites earlier turns, so the assistant's part cannot be "
                "told apart; give the template {% generation %} marks."
            )
        spans.append((len(before), len(upto)))
    return text, spans
