"""Conversations: which tokens are the assistant's, for templates as model families have them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_cache.corpus.chat import encode_chat
from ddk_cache.corpus.document import Conversation, PromptResponse
from ddk_cache.errors import InputError
from ddk_cache.testing import END, byte_tokenizer

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


# --- templates of model families ------------------------------------------------------------------

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"

ENDS = {
    "qwen2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": END,
    "qwen3": "<|im_end|>",
    "deepseek_r1": "<｜end▁of▁sentence｜>",
    "marked": "<|im_end|>",
}
"""Family → the token that ends a turn."""

CONTROL = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>",
]  # fmt: skip

SYSTEM = {"role": "system", "content": "Be kind."}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_calls": None},
    {"role": "assistant", "content": "It is 2."},
]


def family(name: str) -> Any:
    """Return a byte tokenizer with the control tokens of all families and the template of one."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    if name:
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


def samples(
    name: str, document: Conversation | PromptResponse, learn: str = "assistant"
) -> list[tuple[str, list[str]]]:
    """Return each sample as text without its end, and the parts of it that are learned."""
    tokenizer, found = family(name), []
    for ids, learned in encode_chat(tokenizer, document, learn):
        assert ids[-1] == tokenizer.eos_token_id
        runs = itertools.groupby(zip(ids[:-1], learned, strict=False), key=lambda pair: pair[1])
        parts = [tokenizer.decode([token for token, _ in run]) for flag, run in runs if flag]
        found.append((tokenizer.decode(ids[:-1]), parts))
    return found


def learned(name: str, *args: Any) -> list[list[str]]:
    """Return the learned parts of each sample."""
    return [parts for _, parts in samples(name, *args)]


@pytest.mark.parametrize("name", ["qwen2", "llama3", "mistral", "deepseek_r1"])
def test_a_template_that_appends_gives_one_sample(name: str) -> None:
    end = ENDS[name]
    ((text, parts),) = samples(name, Conversation([SYSTEM, *MESSAGES]))
    assert "Be kind." in text
    space = " " if name == "mistral" else ""  # it has no header, so the space is the assistant's
    assert parts == [f"{space}hello{end}", f"{space}so long{end}"]
    assert learned(name, Conversation([SYSTEM, *MESSAGES]), "last") == [[f"{space}so long{end}"]]
    assert samples(name, Conversation([SYSTEM, *MESSAGES]), "all") == [(text, [text])]


def test_gemma_has_no_system_prompt() -> None:
    end = ENDS["gemma"]
    assert learned("gemma", Conversation(MESSAGES)) == [[f"hello{end}", f"so long{end}"]]
    with pytest.raises(InputError, match="template refuses it: System role not supported"):
        samples("gemma", Conversation([SYSTEM, *MESSAGES]))


CALLS = {
    "qwen2": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    "qwen3": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    "llama3": '{"name": "add", "parameters": {"a": 1}}',
    "mistral": '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]',
    "deepseek_r1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    '{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
}
"""Family → how a call is written."""


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_tools_are_learned_and_their_results_are_not(name: str) -> None:
    tools = None if name == "deepseek_r1" else TOOLS
    found = samples(name, Conversation(CALLING, tools))
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""  # only in the last turn
    space = " " if name == "mistral" else ""
    call, answer = (part for _, parts in found for part in parts)
    assert call == f"{thought}{CALLS[name]}{ENDS[name]}"
    assert answer == f"{thought}{space}It is 2.{ENDS[name]}"
    assert len(found) == 1 + (name == "qwen3")
    for text, _ in found:
        assert text.count("add") == 1 + bool(tools)


def test_a_template_that_leaves_out_tools_is_refused() -> None:
    with pytest.raises(InputError, match="'tools', which the chat template leaves out"):
        samples("gemma", Conversation(CALLING[:1], TOOLS))


def test_tools_that_move_make_a_sample_of_each_turn() -> None:
    first, second = samples("mistral", Conversation(MESSAGES, TOOLS))
    assert first[1] == [f" hello{END}"]
    assert second[1] == [f" so long{END}"]
    assert first[0].index("[AVAILABLE_TOOLS]") < first[0].index("hi")
    assert second[0].index("hello") < second[0].index("[AVAILABLE_TOOLS]") < second[0].index("bye")


# --- reasoning ------------------------------------------------------------------------------------

INLINE = [
    MESSAGES[0],
    {"role": "assistant", "content": "<think>\ngreet\n</think>\n\nhello"},
    MESSAGES[2],
    {"role": "assistant", "content": "<think>\npart\n</think>\n\nso long"},
]
APART = [
    MESSAGES[0],
    {"role": "assistant", "content": "hello", "reasoning_content": "greet"},
    MESSAGES[2],
    {"role": "assistant", "content": "so long", "reasoning_content": "part"},
]


@pytest.mark.parametrize(
    ("name", "messages", "begins", "between"),
    [
        ("qwen3", INLINE, "<think>\n", "\n</think>\n\n"),
        ("qwen3", APART, "<think>\n", "\n</think>\n\n"),
        ("deepseek_r1", INLINE, "", "\n</think>\n\n"),  # its prompt has the <think>
        ("marked", APART, "<think>\n", "\n</think>\n"),
    ],
)
def test_a_turn_is_learned_with_its_reasoning_and_seen_later_without(
    name: str, messages: list[dict[str, Any]], begins: str, between: str
) -> None:
    first, second = samples(name, Conversation([*messages, {"role": "user", "content": "more"}]))
    assert first[1] == [f"{begins}greet{between}hello{ENDS[name]}"]
    assert second[1] == [f"{begins}part{between}so long{ENDS[name]}"]
    assert "hello" in second[0]
    assert "greet" not in second[0]
    assert first[0].count("<think>") == second[0].count("<think>") == 1
    assert learned(name, Conversation(messages), "last") == [second[1]]
    ((whole, _),) = samples(name, Conversation(messages), "all")
    assert "greet" not in whole


def test_turns_after_one_question_share_a_sample() -> None:
    steps = [{**CALLING[1], "reasoning_content": "I must add"}, CALLING[2]]
    steps += [{**CALLING[3], "reasoning_content": "I see"}]
    first, second = samples("qwen3", Conversation([*MESSAGES[:2], CALLING[0], *steps], TOOLS))
    end = ENDS["qwen3"]
    assert first[1] == [f"<think>\n\n</think>\n\nhello{end}"]
    call, answer = second[1]
    assert call == f"<think>\nI must add\n</think>\n\n{CALLS['qwen3']}{end}"
    assert answer == f"<think>\nI see\n</think>\n\nIt is 2.{end}"


def test_reasoning_without_an_answer() -> None:
    messages: list[Any] = [
        MESSAGES[0],
        {"role": "assistant", "reasoning_content": "hm", "content": None},
    ]
    assert learned("qwen3", Conversation(messages)) == [["<think>\nhm\n</think>\n\n<|im_end|>"]]
    messages = [MESSAGES[0], {"role": "assistant", "content": "<think>\nhm\n</think>"}]
    assert learned("deepseek_r1", Conversation(messages)) == [
        ["hm\n</think><｜end▁of▁sentence｜>"],
    ]


# --- contents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "llama3", "gemma", "qwen3", "deepseek_r1", "marked"])
def test_an_empty_answer_is_the_end_of_the_turn(name: str) -> None:
    messages = [MESSAGES[0], {"role": "assistant", "content": ""}]
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert learned(name, Conversation(messages)) == [[thought + ENDS[name]]]


def test_parts_of_text_are_joined_and_others_refused() -> None:
    parts: list[Any] = [{"type": "text", "text": "hel"}, "lo", {"type": "text", "text": "", "x": 1}]
    messages = [{"role": role, "content": parts} for role in ("user", "assistant")]
    ((text, said),) = samples("qwen2", Conversation(messages))
    assert text.count("hello") == 2
    assert said == ["hello<|im_end|>"]
    messages[0]["content"] = [{"type": "image", "url": "x"}]
    with pytest.raises(InputError, match=r"message 1 \(user\): a part of its content .* 'image'"):
        samples("qwen2", Conversation(messages))


def test_control_tokens_are_text_wherever_somebody_wrote_them() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "<|im_end|>"}}}
    said = {"role": "assistant", "content": "x", "reasoning_content": "<|im_end|>"}
    messages: list[Any] = [
        {"role": "user", "content": "<|im_end|>"},
        {**said, "tool_calls": [call]},
    ]
    ((ids, _),) = encode_chat(family("qwen3"), Conversation(messages))
    assert ids.count(family("").convert_tokens_to_ids("<|im_end|>")) == 2
    ((ids, _),) = encode_chat(family("marked"), Conversation(messages))
    assert ids.count(family("").convert_tokens_to_ids("<|im_end|>")) == 2


SAID = st.text(st.sampled_from("ab é\n<|im_end>z中"), min_size=1).map(str.strip).filter(bool)


@given(
    name=st.sampled_from(["qwen2", "llama3", "gemma", "mistral"]),
    turns=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4),
    learn=st.sampled_from(["assistant", "last"]),
)
def test_what_is_learned_is_what_the_assistant_said(
    name: str, turns: list[tuple[str, str]], learn: str
) -> None:
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    space = " " if name == "mistral" else ""
    expected = [f"{space}{answer}{ENDS[name]}" for _, answer in turns]
    ((_, parts),) = samples(name, Conversation(messages), learn)
    assert "".join(parts) == "".join(expected[-1:] if learn == "last" else expected)


# --- prompts and responses ------------------------------------------------------------------------


def test_a_prompt_and_its_response_are_a_conversation_where_there_is_a_template() -> None:
    document = PromptResponse("hi", "hello")
    assert samples("qwen2", document) == samples("qwen2", Conversation(MESSAGES[:2]))


@pytest.mark.parametrize(
    ("prompt", "response", "text"),
    [
        ("1 + 1?", "2", "1 + 1?\n2"),
        ("The sky is", " blue", "The sky is blue"),
        ("A: ", "2", "A: 2"),
        ("", "2", "2"),
        (f"say {END}", f"{END}!", f"say {END}\n{END}!"),
    ],
)
def test_without_a_template_they_are_joined_and_the_response_is_learned_with_its_end(
    prompt: str, response: str, text: str
) -> None:
    tokenizer = family("")
    ((ids, counted),) = encode_chat(tokenizer, PromptResponse(prompt, response))
    assert tokenizer.decode(ids) == text + END
    said = [token for token, flag in zip(ids, counted, strict=True) if flag]
    assert tokenizer.decode(said) == response + END
    assert ids.count(tokenizer.eos_token_id) == 1
    ((_, counted),) = encode_chat(tokenizer, PromptResponse(prompt, response), "all")
    assert all(counted)


def test_what_the_assistant_says_in_a_prompt_is_not_learned() -> None:
    assert learned("qwen2", Conversation(MESSAGES, given=2)) == [["so long<|im_end|>"]]
    assert learned("qwen2", Conversation(MESSAGES, given=4)) == [[]]
