"""Prompts, and prompts with a response, from the documents of a corpus.

A prompt is a text (column `prompt`) or the messages of a conversation (column `messages`) that end
where the assistant is to speak. With a chat template a text becomes the message of a user, so that
both kinds reach a model in the form that it was trained on; the price is that a text for a model
that has a template cannot be given without one.

What `generate` wrote is known by its metadata and read with its token ids: text → ids → text is
not always the way back to the tokens that a model chose.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddk_cache.corpus.chat import encode_prompt
from ddk_cache.corpus.files import Value
from ddk_cache.corpus.sources import Source, values
from ddk_cache.errors import InputError
from ddk_cache.hashing import canonical, digest

Messages = list[dict[str, Any]]

COLUMNS = ("messages", "prompt")
"""Where prompts are looked for when no column is named."""

METADATA = b"ddk"
"""Key of the metadata of a Parquet file of responses."""


@dataclass(frozen=True)
class Prompt:
    """What a model is to answer, and the response that came with it."""

    asked: str | Messages
    where: str
    """For messages: "web/a.jsonl: line 3"."""
    response: str = ""
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
        """Return the tokens of what is asked. Raises InputError, as `encode_prompt`, or for none.

        Without a chat template the tokens of a text are those of the text alone.
        """
        if isinstance(self.asked, str) and not tokenizer.chat_template:
            ids = plain_ids(tokenizer, self.asked)
        else:
            ids = encode_prompt(tokenizer, self.messages)
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

    def unanswered(value: Value) -> Prompt:
        prompt = _prompt(value)
        if prompt.response:
            raise InputError(
                f"{value.where}: the conversation ends with the assistant, expected a turn of the "
                "user. Remove the last message."
            )
        return prompt

    return _found(source, map(unanswered, filter(_is_there, values(source, COLUMNS))))


def read_answered(source: Source) -> Iterator[Prompt]:
    """Yield the prompts of a source with their responses, in order.

    The source was written by `generate`, or has conversations that end with the assistant, or
    columns `prompt` and `response`.

    Raises:
        InputError: the source cannot be read, or a prompt has no response.
    """
    generated = any(written_with(Path(file)) for file in source.files[:1])
    read = _read_generated if generated else _read_columns
    return _found(source, map(_answered, read(source)))


def written_with(file: Path) -> dict[str, Any]:
    """Return the settings that `generate` wrote a Parquet file with; {} for any other file."""
    with file.open("rb") as opened:
        try:
            found = (pq.read_schema(opened).metadata or {}).get(METADATA)
        except (OSError, pa.ArrowException):  # not Parquet; reading it says so
            return {}
    return dict(json.loads(found)) if found else {}


def _read_generated(source: Source) -> Iterator[Prompt]:
    for file in source.files:
        with Path(file).open("rb") as opened:
            table = pq.read_table(opened)
        for number, row in enumerate(table.to_pylist(), 1):
            asked = row["messages"][:-1] if "messages" in row else row["prompt"]
            where, ids = f"{file}: row {number}", tuple(row["response_ids"])
            yield Prompt(asked, where, row["response"], ids)


def _read_columns(source: Source) -> Iterator[Prompt]:
    asked = values(source, COLUMNS)
    first = next(asked, None)
    if first is None:
        return
    stream = itertools.chain([first], asked)
    if first.column == "messages":
        yield from map(_prompt, filter(_is_there, stream))
        return
    responses = values(dataclasses.replace(source, column="response"))
    for value, response in zip(stream, responses, strict=True):
        yield dataclasses.replace(_prompt(value), response=response.value)


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


def _is_there(value: Value) -> bool:
    return bool(value.value.strip() if isinstance(value.value, str) else value.value)


def _prompt(value: Value) -> Prompt:
    """Return what a column holds as a prompt, with the assistant's last turn as its response."""
    where, column, content = value
    if isinstance(content, str) and column != "messages":
        return Prompt(content, where)
    if not isinstance(content, list) or not all(isinstance(m, Mapping) for m in content):
        expected = "a list of messages" if column == "messages" else "text or a list of messages"
        raise InputError(
            f"{where}: column {column!r} holds {type(content).__name__}, expected {expected}."
        )
    messages = [dict(message) for message in content]
    if messages[-1].get("role") != "assistant":
        return Prompt(messages, where)
    return Prompt(messages[:-1], where, str(messages[-1].get("content") or ""))


def _answered(prompt: Prompt) -> Prompt:
    if not isinstance(prompt.response, str) or not (prompt.response or prompt.response_ids):
        raise InputError(
            f"{prompt.where}: the prompt has no response. Give a data set with responses, or the "
            "directory that 'ddk-cache generate' wrote."
        )
    return prompt


def encoded(
    source: Source, prompts: Iterable[Prompt], encode: Callable[[Prompt], Any]
) -> Iterator[Any]:
    """Yield `encode` of each prompt. Raises InputError that names domain and prompt."""
    for prompt in prompts:
        try:
            yield encode(prompt)
        except InputError as error:
            raise InputError(f"domain {source.name!r}: {prompt.where}: {error}") from error
