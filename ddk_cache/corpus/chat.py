"""A conversation → tokens, with the assistant's marked.

The mask follows from the text that the chat template makes of growing parts of the conversation,
so any template works that only ever appends; the price is that a conversation of N answers is
rendered 2 N + 1 times.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ddk_cache.errors import InputError

Encoded = tuple[list[int], list[bool]]
"""The tokens of a document, and for each whether it is a label that the loss counts."""

ROLES = ("system", "user", "assistant", "tool")

_MARKS = re.compile("\ue000([0-9]+)\ue001")
"""What stands for a control token of a message while the template is applied."""


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> Encoded:
    """Tokenize a conversation by the tokenizer's chat template and mark the assistant's tokens.

    A template with `{% generation %}` marks them itself. For any other, the assistant's part of
    the text is what each of its messages adds to the conversation before it, up to the token that
    ends the turn. A control token inside a message is tokenized as text, except where the template
    marks the assistant itself.

    Raises:
        InputError: there is no template, a message has no role, an unknown one or no content, the
            template refuses the messages, or it rewrites earlier turns, so that what the assistant
            added is unknown.
    """
    if not tokenizer.chat_template:
        raise InputError("the corpus holds 'messages', but the tokenizer has no chat template.")
    for number, message in enumerate(messages, 1):
        _check(number, message)
    try:
        if re.search(r"{%-?\s*generation\s*-?%}", tokenizer.chat_template):
            out = tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]
        return _encode_by_spans(tokenizer, messages)
    except InputError:
        raise
    except Exception as error:  # jinja2 raises whatever the template asks for
        raise InputError(f"the chat template refuses it: {error}") from error


def encode_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the tokens of a conversation up to where the assistant's next turn begins.

    A control token inside a message is tokenized as text.

    Raises:
        InputError: there is no template, it refuses the messages, or one is not a message.
    """
    if not tokenizer.chat_template:
        raise InputError("the corpus holds 'messages', but the tokenizer has no chat template.")
    for number, message in enumerate(messages, 1):
        _check(number, message)
    control = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    guarded = [_guard(message, control) for message in messages]
    try:
        text = tokenizer.apply_chat_template(guarded, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2 raises whatever the template asks for
        raise InputError(f"the chat template refuses it: {error}") from error
    ids: list[int] = []
    for _, piece, literal in _pieces(text, control):
        ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=literal)["input_ids"]
    return ids


def _check(number: int, message: Mapping[str, Any]) -> None:
    """Raise InputError where a message cannot be attributed, or says nothing."""
    role = message.get("role")
    if role not in ROLES:
        got = f"role {role!r}" if role is not None else f"no 'role' but {', '.join(message)}"
        raise InputError(f"message {number}: got {got}, expected a role of {', '.join(ROLES)}.")
    if message.get("content") is None and not message.get("tool_calls"):
        raise InputError(f"message {number} ({role}) has no 'content'.")


def _encode_by_spans(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> Encoded:
    control = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    guarded = [_guard(message, control) for message in messages]
    text, spans = _spans(tokenizer, guarded, tuple(control))
    ids: list[int] = []
    counted: list[bool] = []
    for first, piece, literal in _pieces(text, control):
        out = tokenizer(
            piece,
            add_special_tokens=False,
            split_special_tokens=literal,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids += out["input_ids"]
        for offset, _ in out["offset_mapping"]:
            place = first if literal else first + offset
            counted.append(any(begin <= place < end for begin, end in spans))
    return ids, counted


def _guard(message: Mapping[str, Any], control: Sequence[str]) -> dict[str, Any]:
    """Return a message in whose content each control token is replaced by a mark."""
    content = message.get("content")
    if not isinstance(content, str):
        return dict(message)
    for number, token in enumerate(control):
        content = content.replace(token, f"\ue000{number}\ue001")
    return {**message, "content": content}


def _pieces(text: str, control: Sequence[str]) -> list[tuple[int, str, bool]]:
    """Split a text at its marks: (place in the text, piece, whether it was a mark)."""
    pieces, place = [], 0
    for mark in _MARKS.finditer(text):
        pieces.append((place, text[place : mark.start()], False))
        pieces.append((mark.start(), control[int(mark[1])], True))
        place = mark.end()
    pieces.append((place, text[place:], False))
    return [piece for piece in pieces if piece[1]]


def _spans(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], control: tuple[str, ...]
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation; return its text and where in it the assistant speaks."""

    def render(messages: Sequence[Mapping[str, Any]], ask: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        )

    text, spans = render(messages), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        upto = render(messages[: index + 1])
        if index:
            before = render(messages[:index], ask=True)
        else:  # a header, and perhaps a default system prompt, that no message before it shows
            letter = "y" if str(message.get("content")).lstrip().startswith("x") else "x"
            before = _common_start(upto, render([{**message, "content": letter}]))
        if not (upto.startswith(before) and text.startswith(upto)):
            raise InputError(
                "the chat template rewrites earlier turns, so the assistant's part is unknown. "
                "Give the template {% generation %} marks."
            )
        turn = upto.rstrip()  # a template may put a newline after the token that ends the turn
        spans.append((len(before), len(turn if turn.endswith(control) else upto)))
    return text, spans


def _common_start(one: str, other: str) -> str:
    """Return what two texts begin with alike."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return one[: sum(1 for _ in alike)]
