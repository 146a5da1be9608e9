"""A conversation, or a prompt and its response → tokens, with those marked that are learned.

What the assistant said follows from the text that the chat template makes of growing parts of the
conversation. A template that only appends gives one sample for all of it. One that rewrites earlier
turns (Qwen3's leaves out their reasoning) shows each turn as it was generated only while that turn
is the last, so a turn whose text the later ones change is a sample of its own. The price is that a
conversation of N answers is rendered 2 N + 1 times.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ddk_cache.corpus.document import Conversation, Message, PromptResponse
from ddk_cache.corpus.spans import Encoded, Sample, Span, control_tokens, encode_sample, guard
from ddk_cache.errors import InputError

ROLES = ("system", "user", "assistant", "tool")

THINK, END_OF_THINKING = "<think>", "</think>"

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")

_TESTS_FOR_NONE = re.compile(r"content(['\"]\])? is (not )?none")


def encode_chat(
    tokenizer: Any, document: Conversation | PromptResponse, learn: str = "assistant"
) -> list[Encoded]:
    """Tokenize a conversation, or a prompt and its response, and mark what is learned.

    A prompt and its response are a conversation where the tokenizer has a chat template; else they
    are joined as text, and the response is learned. `learn` is one of `ddk_cache.format.spec.LEARN`
    and says which tokens of a conversation are: those of the assistant's messages up to the token
    that ends the turn, those of the last such message, or all. A control token inside a message is
    tokenized as text.

    Each turn of the assistant is learned in one of the samples that are returned, in order. There
    are several where the template rewrites earlier turns. Each is closed by the end-of-text token,
    which is learned where text is.

    Raises:
        InputError: there is no template, a message has no role, an unknown one or no content, or
            the template refuses the messages, or changes them so that what the assistant added is
            unknown.
    """
    control = control_tokens(tokenizer)
    if isinstance(document, PromptResponse) and tokenizer.chat_template:
        document = document.as_conversation()
    if isinstance(document, PromptResponse):
        samples, closing = [_joined(guard([document.prompt, document.response], control))], True
        if learn == "all":
            samples = [Sample(text, [(0, len(text))]) for text, _ in samples]
    else:
        samples, closing = _samples(tokenizer, document, learn, control), learn == "all"
    encoded = (encode_sample(tokenizer, sample, control) for sample in samples)
    return [([*ids, tokenizer.eos_token_id], [*learned, closing]) for ids, learned in encoded]


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the tokens of messages up to where the assistant's next turn begins.

    A control token inside a message is tokenized as text.

    Raises:
        InputError: there is no template, it refuses the messages, or one is not a message.
    """
    if not tokenizer.chat_template:
        raise InputError("the corpus holds 'messages', but the tokenizer has no chat template.")
    control = control_tokens(tokenizer)
    plain = [plain_message(number, message) for number, message in enumerate(messages, 1)]
    try:
        text = _Template(tokenizer, None).render(guard(plain, control), ask=True)
    except Exception as error:  # jinja2 raises whatever the template asks for
        raise InputError(f"the chat template refuses it: {error}") from error
    return encode_sample(tokenizer, Sample(text, ()), control)[0]


def _joined(texts: Sequence[str]) -> Sample:
    """Join a prompt and a response, by a newline unless one of them has whitespace there."""
    prompt, response = texts
    if prompt and not prompt[-1].isspace() and not response[0].isspace():
        prompt += "\n"
    return Sample(prompt + response, [(len(prompt), len(prompt) + len(response))])


# --- messages -------------------------------------------------------------------------------------


def plain_message(number: int, message: Message) -> dict[str, Any]:
    """Return a message as templates expect it: its content a text, and no empty fields.

    Parquet gives every message the fields of all, empty where a message lacks them.

    Raises:
        InputError: the message cannot be attributed, or says nothing.
    """
    role = message.get("role")
    if role not in ROLES:
        got = f"role {role!r}" if role is not None else f"no 'role' but {', '.join(message)}"
        raise InputError(f"message {number}: got {got}, expected a role of {', '.join(ROLES)}.")
    plain: dict[str, Any] = _without_none(message)
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "".join(_text(part, f"message {number} ({role})") for part in content)
    elif content is None and plain.get("reasoning_content"):
        plain["content"] = ""
    elif content is None and not plain.get("tool_calls"):
        raise InputError(f"message {number} ({role}) has no 'content'.")
    return plain


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _text(part: Any, where: str) -> str:
    """Return the text of one part of a content. Raises InputError where it has none."""
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise InputError(f"{where}: a part of its content is of type {kind!r}, expected text.")
    return text


# --- samples --------------------------------------------------------------------------------------


class _Template:
    """A chat template, with the tools of one conversation."""

    def __init__(self, tokenizer: Any, tools: Any) -> None:
        self.jinja: str = tokenizer.get_chat_template(tools=tools)
        self.tools, self.special_tokens = tools, tokenizer.special_tokens_map
        self.marks = bool(_GENERATION.search(self.jinja))
        """Whether it marks what the assistant says."""

    def render(self, messages: Sequence[Message], ask: bool = False) -> str:
        """Return the text of messages; with `ask`, also what makes the assistant answer."""
        return self.marked(messages, ask)[0]

    def marked(self, messages: Sequence[Message], ask: bool = False) -> tuple[str, Sequence[Span]]:
        """Return the text of messages and the spans that the template marks.

        The renderer of transformers is called below `apply_chat_template`, which leaves out
        contents of None and gives no spans of text.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            [list(messages)],
            tools=self.tools,
            chat_template=self.jinja,
            return_assistant_tokens_mask=self.marks,
            add_generation_prompt=ask,
            **self.special_tokens,
        )
        return texts[0], spans[0] if self.marks else ()


def _samples(
    tokenizer: Any, conversation: Conversation, learn: str, control: tuple[str, ...]
) -> list[Sample]:
    """Render a conversation as few samples as show each turn that is learned as it was generated.

    Raises:
        InputError: as `encode_chat`.
    """
    if not tokenizer.chat_template:
        raise InputError("the corpus holds 'messages', but the tokenizer has no chat template.")
    messages = [
        plain_message(number, message) for number, message in enumerate(conversation.messages, 1)
    ]
    turns = [
        place
        for place, message in enumerate(messages)
        if message["role"] == "assistant" and place >= conversation.given
    ]
    tools = _without_none(list(conversation.tools)) if conversation.tools else None
    try:
        template = _Template(tokenizer, guard(tools, control))
        if tools and "tools" not in template.jinja:
            raise InputError(
                "it comes with 'tools', which the chat template leaves out. Give a tokenizer whose "
                "template has them, or leave the column out."
            )
        if _TESTS_FOR_NONE.search(template.jinja):
            messages = [{"content": None, **message} for message in messages]
        messages = guard(messages, control)
        if learn == "all":
            text = template.render(messages)
            return [Sample(text, [(0, len(text))])]
        return _by_turn(template, messages, turns[-1:] if learn == "last" else turns, control)
    except InputError:
        raise
    except Exception as error:  # jinja2 raises whatever the template asks for
        raise InputError(f"the chat template refuses it: {error}") from error


def _by_turn(
    template: _Template, messages: list[Message], turns: list[int], control: tuple[str, ...]
) -> list[Sample]:
    """Return samples of some turns, in order; a turn is in the sample of a later one whose text
    begins with its own.
    """  # noqa: D205
    text, spans = template.render(messages), list[Span]()
    samples = []
    for place in reversed(turns):
        turn = _turn(template, messages[:place], messages[place], control)
        if not text.startswith(turn.text):
            if spans:
                samples.append(Sample(text, spans))
            text, spans = turn.text, []
        spans = [*turn.spans, *spans]
    return [Sample(text, spans), *reversed(samples)]


def _turn(
    template: _Template, history: list[Message], message: Message, control: tuple[str, ...]
) -> Sample:
    """Render a message of the assistant after what came before it; the message is learned.

    Raises:
        InputError: the template changes the history, so that where the message begins is unknown.
    """
    text, marked = template.marked([*history, message])
    before = template.render(history) if history else ""
    if template.marks:
        begin = len(_common_start(text, before))
        return Sample(text, [span for span in marked if span[0] >= begin])
    prompt = template.render(history, ask=True) if history else ""
    if history and text.startswith(prompt):
        return Sample(text, [(len(prompt), _end(text, control))])
    # A header, and perhaps a default system prompt, that what came before does not show.
    content = str(message.get("content"))
    other = {"role": "assistant", "content": "y" if content.lstrip().startswith("x") else "x"}
    header = _common_start(text, template.render([*history, other]))
    if not header.startswith(before):
        raise InputError(
            "the chat template rewrites earlier turns, so the assistant's part is unknown. "
            "Give the template {% generation %} marks."
        )
    if prompt.removeprefix(header).strip() == THINK and END_OF_THINKING in content:
        text = prompt + _thought(content, text.removeprefix(header))
        header = prompt
    return Sample(text, [(len(header), _end(text, control))])


def _thought(content: str, shown: str) -> str:
    """Return a message as it was generated where the template leaves out all reasoning.

    DeepSeek-R1's and QwQ's do, and put `<think>` into their prompt for an answer. `shown` is what
    the template makes of the message: the answer and the end of the turn.
    """
    answer = content.rpartition(END_OF_THINKING)[2].strip()
    end = shown.rpartition(answer)[2] if answer else shown.lstrip()
    return content.strip().removeprefix(THINK).lstrip("\n") + end


def _end(text: str, control: tuple[str, ...]) -> int:
    """Return where a turn ends: a template may put a newline after the token that ends it."""
    turn = text.rstrip()
    return len(turn) if turn.endswith(control) else len(text)


def _common_start(one: str, other: str) -> str:
    """Return what two texts begin with alike."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return one[: sum(1 for _ in alike)]
