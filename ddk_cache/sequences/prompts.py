"""Prompts, and prompts with a response, from the documents of a corpus.

A prompt is a text (column `prompt`) or messages (column `messages` or `prompt`) that end where the
assistant is to speak. With a chat template a text becomes the message of a user, so that both kinds
reach a model in the form that it was trained on; the price is that a text for a model that has a
template cannot be given without one.

What `generate` wrote is known by its metadata and read with its token ids: text → ids → text is
not always the way back to the tokens that a model chose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddk_cache.corpus.chat import encode_prompt, plain_message
from ddk_cache.corpus.document import LAYOUTS, Conversation, Document, PromptResponse, document_of
from ddk_cache.corpus.files import Layout
from ddk_cache.corpus.rows import content
from ddk_cache.corpus.sources import Source, read_fields
from ddk_cache.errors import InputError
from ddk_cache.hashing import canonical, digest

Messages = list[dict[str, Any]]

PROMPTS = (Layout(("messages",)), Layout(("prompt",)))
"""Where prompts are looked for when no column is named: the first that a file has."""

METADATA = b"ddk"
"""Key of the metadata of a Parquet file of responses."""


@dataclass(frozen=True)
class Prompt:
    """What a model is to answer, and the response that came with it."""

    asked: str | Messages
    where: str
    """For messages: "web/a.jsonl: line 3"."""
    response: str = ""
    content: bytes = b""
    """What identifies the document of prompt and response."""
    response_ids: tuple[int, ...] = ()
    """The tokens of the response, where they are known."""

    @property
    def hash(self) -> str:
        """Return the content hash of what is asked."""
        return digest(canonical(self.asked))

    @property
    def messages(self) -> Messages:
        """Return what is asked as messages of a conversation."""
        if isinstance(self.asked, str):
            return [{"role": "user", "content": self.asked}]
        return self.asked

    def encode(self, tokenizer: Any) -> list[int]:
        """Return the tokens of what is asked, up to where the response begins.

        Without a chat template they are those of the text, which a newline ends, as in a cache of
        prompts with responses.

        Raises:
            InputError: as `encode_prompt`, or there is no token.
        """
        if not isinstance(self.asked, str) or tokenizer.chat_template:
            ids = encode_prompt(tokenizer, self.messages)
        else:
            ends = not self.asked or self.asked[-1].isspace()
            ids = plain_ids(tokenizer, self.asked if ends else f"{self.asked}\n")
        if not ids:
            raise InputError("the prompt has no token.")
        return ids


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, in which control tokens are text."""
    out = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return list(out["input_ids"])


def read_prompts(source: Source) -> Iterator[Prompt]:
    """Yield the prompts of a source in order; blank ones are left out.

    Raises:
        InputError: the source cannot be read, has no prompt or no such column, or a conversation
            ends with the assistant.
    """
    return _found(source, map(_unanswered, _documents(source, PROMPTS)))


def read_answered(source: Source) -> Iterator[Prompt]:
    """Yield the prompts of a source with their responses, in order.

    The source was written by `generate`, or has conversations that end with the assistant, or
    prompts and responses as `ddk-cache build` takes them.

    Raises:
        InputError: the source cannot be read, or a prompt has no response.
    """
    if any(written_with(Path(file)) for file in source.files[:1]):
        return _found(source, _generated(source))
    return _found(source, map(_answered, _documents(source)))


def written_with(file: Path) -> dict[str, Any]:
    """Return the settings that `generate` wrote a Parquet file with; {} for any other file."""
    with file.open("rb") as opened:
        try:
            found = (pq.read_schema(opened).metadata or {}).get(METADATA)
        except (OSError, pa.ArrowException):  # not Parquet; reading it says so
            return {}
    return dict(json.loads(found)) if found else {}


def _documents(
    source: Source, layouts: Sequence[Layout] = LAYOUTS
) -> Iterator[tuple[str, Document]]:
    """Yield where each document of a source is, and the document."""
    for fields in read_fields(source, layouts):
        document = document_of(fields)
        if document:
            yield fields.where, document


def _generated(source: Source) -> Iterator[Prompt]:
    for file in source.files:
        with Path(file).open("rb") as opened:
            # Not read_table: its threads may abort a command that ends while they start.
            table = pq.ParquetFile(opened).read(use_threads=False)
        for number, row in enumerate(table.to_pylist(), 1):
            said: Document = PromptResponse(row["prompt"], row["response"])
            if "messages" in row:
                said = Conversation(row["messages"])
            where, ids = f"{file}: row {number}", tuple(row["response_ids"])
            asked = row["messages"][:-1] if "messages" in row else row["prompt"]
            yield Prompt(asked, where, row["response"], content(said), ids)


def _found(source: Source, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """Name the domain in an error, and raise one where there is no prompt."""
    empty = True
    try:
        for prompt in prompts:
            empty = False
            yield prompt
    except InputError as error:
        raise InputError(f"domain {source.name!r}: {error}") from error
    if empty:
        raise InputError(f"domain {source.name!r}: {source.place} holds no prompt.")


def _unanswered(found: tuple[str, Document]) -> Prompt:
    """Return a document as a prompt. Raises InputError where it ends with a response."""
    where, document = found
    if isinstance(document, str):
        return Prompt(document, where)
    assert isinstance(document, Conversation)  # what `PROMPTS` hold
    messages = _messages(where, document)
    if messages[-1]["role"] == "assistant":
        raise InputError(
            f"{where}: the conversation ends with the assistant, expected a turn of the user. "
            "Remove the last message."
        )
    return Prompt(messages, where)


def _answered(found: tuple[str, Document]) -> Prompt:
    """Return a document as a prompt with its response. Raises InputError where it has none."""
    where, document = found
    if isinstance(document, PromptResponse):
        return Prompt(document.prompt, where, document.response, content(document))
    if isinstance(document, Conversation):
        *asked, last = _messages(where, document)
        if asked and last["role"] == "assistant" and last["content"]:
            return Prompt(asked, where, last["content"], content(document))
    raise InputError(
        f"{where}: the prompt has no response. Give a data set with responses, or the directory "
        "that 'ddk-cache generate' wrote."
    )


def _messages(where: str, document: Conversation) -> Messages:
    """Return the messages of a conversation, each a role and a text.

    Raises:
        InputError: one is not a message, or calls tools, which a response cannot follow here.
    """
    found = []
    for number, message in enumerate(document.messages, 1):
        try:
            known = plain_message(number, message)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if known.get("tool_calls"):
            raise InputError(f"{where}: message {number} calls tools, expected text alone.")
        found.append({"role": known["role"], "content": known["content"]})
    return found


def encoded(
    source: Source, prompts: Iterable[Prompt], encode: Callable[[Prompt], Any]
) -> Iterator[Any]:
    """Yield `encode` of each prompt. Raises InputError that names domain and prompt."""
    for prompt in prompts:
        try:
            yield encode(prompt)
        except InputError as error:
            raise InputError(f"domain {source.name!r}: {prompt.where}: {error}") from error
