"""Conversations: which tokens are the assistant's, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ddk_cache.corpus.chat import encode_chat
from ddk_cache.corpus.document import Conversation
from ddk_cache.errors import InputError
from ddk_cache.testing import byte_tokenizer

MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }};{% endgeneration %}{% else %}{{ m.content }};{% endif %}{% endfor %}"
)
FORGETFUL = "{% for m in messages[-2:] %}{{ m.content }};{% endfor %}"
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def split(template: str, messages: list[dict[str, Any]]) -> tuple[str, str]:
    """Return a conversation as text, and the part of it that counts."""
    tokenizer = tokenizer_with(template)
    ((ids, counted),) = encode_chat(tokenizer, Conversation(messages))
    assert len(ids) == len(counted)
    assert (ids.pop(), counted.pop()) == (tokenizer.eos_token_id, False)
    said = [token for token, flag in zip(ids, counted, strict=True) if flag]
    return tokenizer.decode(ids), tokenizer.decode(said)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistants_part_counts(template: str) -> None:
    text, said = split(template, MESSAGES)
    assert text == "[user]hi;[assistant]hello;[user]bye;[assistant]so long;"
    assert said == "hello;so long;"


def test_what_follows_the_token_that_ends_a_turn_does_not_count() -> None:
    text, said = split(CHATML, MESSAGES)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>")
    assert said == "hello<|im_end|>so long<|im_end|>"


def test_a_newline_that_ends_a_turn_by_itself_counts() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert split(template, MESSAGES)[1] == "hello\nso long\n"


@pytest.mark.parametrize("content", ["hello", "x", "xylophone", "system", "", "\nhello"])
def test_a_conversation_that_begins_with_the_assistant_learns_no_prompt(content: str) -> None:
    messages = [{"role": "assistant", "content": content}, *MESSAGES[:2]]
    assert split(CHATML, messages)[1] == f"{content}<|im_end|>hello<|im_end|>"


def test_a_control_token_in_a_message_is_text() -> None:
    tokenizer = tokenizer_with(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    told = [{"role": "user", "content": "say <|im_end|> twice"}]
    told.append({"role": "assistant", "content": "<|im_end|><|im_end|> and <|endoftext|>"})
    ((ids, counted),) = encode_chat(tokenizer, Conversation(told))
    assert (ids.pop(), counted.pop()) == (tokenizer.eos_token_id, False)
    assert ids.count(end) == 3  # the system's, the user's and the assistant's turns end
    assert tokenizer.eos_token_id not in ids
    said = [token for token, flag in zip(ids, counted, strict=True) if flag]
    assert tokenizer.decode(said) == "<|im_end|><|im_end|> and <|endoftext|><|im_end|>"
    assert said.count(end) == 1


def test_tool_calls_need_no_content() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "seen"},
        {"role": "assistant", "content": "done"},
    ]
    template = PLAIN.replace("m.content", "(m.content or 'call')")
    assert split(template, messages)[1] == "call;done;"


BAD: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "no template": ("", MESSAGES, "no chat template"),
    "a template that rewrites": (FORGETFUL, MESSAGES, "rewrites earlier turns"),
    "a template that refuses": ("{{ raise_exception('no') }}", MESSAGES, "template refuses it: no"),
    "gpt": (
        PLAIN,
        [MESSAGES[0], {"role": "gpt", "content": "x"}],
        "message 2: got role 'gpt', expected a role of system, user, assistant, tool",
    ),
    "human": (PLAIN, [{"role": "human", "content": "x"}], "message 1: got role 'human'"),
    "capitals": (PLAIN, [{"role": "Assistant", "content": "x"}], "got role 'Assistant'"),
    "other keys": (
        PLAIN,
        [{"from": "gpt", "value": "x"}],
        "message 1: got no 'role' but from, val",
    ),
    "no content": (PLAIN, [{"role": "user"}], "message 1 (user) has no 'content'"),
    "null content": (PLAIN, [{"role": "user", "content": None}], "message 1 (user) has no 'conten"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_conversation_is_refused(case: str) -> None:
    template, messages, said = BAD[case]
    with pytest.raises(InputError, match=re.escape(said)):
        encode_chat(tokenizer_with(template), Conversation(messages))
