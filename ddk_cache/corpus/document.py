"""What a document is (a text, a conversation, a prompt with its response) and in which columns.

The columns of a data set are found by their names alone, in the fixed order of `LAYOUTS`, so what a
corpus means does not depend on what stands in it. The price is that a column of another name must
be named in a mix file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddk_cache.corpus.files import Fields, Layout
from ddk_cache.errors import InputError

LAYOUTS = (
    Layout(("messages",), ("tools",)),
    Layout(("prompt", "response"), ("tools",)),
    Layout(("prompt", "completion"), ("tools",)),
    Layout(("instruction", "output"), ("input",)),
    Layout(("question", "answer")),
    Layout(("text",)),
)
"""Where documents are looked for when no column is named: the first that a file has."""

Message = Mapping[str, Any]
"""A role, a content, and whatever else the chat template uses."""


@dataclass(frozen=True)
class Conversation:
    """Messages, in order."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    """Descriptions (JSON schemas) of the tools that the assistant may call."""
    given: int = 0
    """Leading messages that are a prompt: what the assistant says there is not learned."""

    @property
    def identity(self) -> Any:
        """Return plain JSON values that identify it."""
        if not self.tools and not self.given:
            return self.messages
        return {"messages": self.messages, "tools": self.tools, "given": self.given}


@dataclass(frozen=True)
class PromptResponse:
    """Two texts, of which the second is learned."""

    prompt: str
    response: str

    @property
    def identity(self) -> Any:
        """Return plain JSON values that identify it."""
        return {"prompt": self.prompt, "response": self.response}

    def as_conversation(self) -> Conversation:
        """Return a conversation of one user and one assistant message."""
        messages = (("user", self.prompt), ("assistant", self.response))
        return Conversation([{"role": role, "content": text} for role, text in messages])


Document = str | Conversation | PromptResponse


def layouts_of(column: str | None) -> Sequence[Layout]:
    """Return where documents are looked for: in a column that is named, or in `LAYOUTS`."""
    return (Layout((column,), ("tools",)),) if column else LAYOUTS


def describe(fields: Fields) -> str:
    """Return what documents of such fields are, and in which columns they were found."""
    needed, optional = fields.layout
    found = ", ".join([*needed, *(name for name in optional if fields.values.get(name))])
    if not isinstance(fields.values.get(needed[-1]), str):
        return f"conversations ({found})"
    return f"prompts and responses ({found})" if len(needed) == 2 else f"text ({found})"


def document_of(fields: Fields) -> Document | None:
    """Return the document that some fields hold; None where there is none.

    Raises:
        InputError: a column holds something else than its name promises.
    """
    needed = fields.layout.needed
    found = [_content(fields, column) for column in needed]
    if len(found) == 1:
        (content,) = found
        return Conversation(content, _tools(fields)) if isinstance(content, list) else content
    prompt, response = found
    if response is None:
        return None
    if isinstance(response, list) and not isinstance(prompt, str):
        prompt = prompt or []
        return Conversation([*prompt, *response], _tools(fields), given=len(prompt))
    if isinstance(prompt, list) or isinstance(response, list):
        raise InputError(
            f"{fields.where}: one of the columns {needed[0]!r} and {needed[1]!r} holds text and "
            "the other messages, expected two texts or two lists of messages."
        )
    more = _content(fields, "input") if "input" in fields.layout.optional else None
    texts = [text for text in (prompt, more) if isinstance(text, str)]
    return PromptResponse("\n\n".join(texts), response)


def _content(fields: Fields, column: str) -> str | list[dict[str, Any]] | None:
    """Return the text or the messages in a column; None where it is empty or blank."""
    content: Any = fields.values.get(column)
    if not content or (isinstance(content, str) and content.isspace()):
        return None
    is_list = isinstance(content, list)
    if is_list and all(isinstance(message, dict) for message in content):
        return list(content)
    if isinstance(content, str) and column != "messages":
        return content
    held = f"list of {type(content[0]).__name__}" if is_list else type(content).__name__
    expected = "a list of messages" if column == "messages" else "text or a list of messages"
    raise InputError(f"{fields.where}: column {column!r} holds {held}, expected {expected}.")


def _tools(fields: Fields) -> list[dict[str, Any]] | None:
    """Return the descriptions in the column `tools`: a list, or JSON text of one."""
    tools = fields.values.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools or []]
    except (TypeError, ValueError, RecursionError):
        tools = [None]
    if not all(isinstance(tool, dict) for tool in tools):
        raise InputError(
            f"{fields.where}: column 'tools' holds no list of descriptions, expected JSON schemas."
        )
    return tools or None
