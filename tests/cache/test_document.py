"""Records of data sets → documents: which columns mean what, in every format."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddk_cache.corpus.document import Conversation, Document, PromptResponse
from ddk_cache.corpus.sources import documents, find_sources, held_by
from ddk_cache.errors import InputError
from tests.helpers import jsonl

ASK = [{"role": "user", "content": "hi"}]
SAY = [{"role": "assistant", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "look"}}]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records in the format that the suffix names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text(jsonl(records))


def read(path: Path) -> tuple[list[Document], str]:
    """Return the documents of the only domain of a corpus, and what it is said to hold."""
    (source,) = find_sources(path)
    return list(documents(source)), held_by(source)


PAIRS = [
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("columns", PAIRS, ids="+".join)
def test_pairs_of_columns_are_prompts_and_responses(
    columns: tuple[str, str], suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ddk_cache")
    prompt, response = columns
    rows = [("1 + 1?", "2"), ("why", " "), ("", "so"), ("é", "\n中")]
    records = [{"text": "x", "id": "1", prompt: one, response: other} for one, other in rows]
    write(tmp_path / f"a.{suffix}", records)
    found, said = read(tmp_path)
    assert found == [
        PromptResponse("1 + 1?", "2"),
        PromptResponse("", "so"),
        PromptResponse("é", "\n中"),
    ]
    assert said == f"prompts and responses ({prompt}, {response})"
    assert caplog.messages == [f"domain 'a' holds {said}"]


def test_an_input_follows_its_instruction(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"instruction": "Add.", "input": "1, 1", "output": "2"},
        {"instruction": "Greet.", "input": "", "output": "hello"},
        {"instruction": "Greet.", "input": None, "output": "hi"},
    ]
    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / name, records)
        found, said = read(tmp_path / name)
        assert found == [
            PromptResponse("Add.\n\n1, 1", "2"),
            PromptResponse("Greet.", "hello"),
            PromptResponse("Greet.", "hi"),
        ]
        assert said == "prompts and responses (instruction, output, input)"


def test_prompts_and_completions_may_be_messages(tmp_path: Path) -> None:
    records = [{"prompt": [*ASK, *SAY, *ASK], "completion": SAY, "tools": None}]
    write(tmp_path / "a.parquet", records)
    (found,), said = read(tmp_path)
    assert found == Conversation([*ASK, *SAY, *ASK, *SAY], given=3)
    assert said == "conversations (prompt, completion)"


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
def test_tools_come_beside_messages(tools: Any, tmp_path: Path) -> None:
    several: list[Any] = [tools, None, []]
    records = [{"messages": [*ASK, *SAY], "tools": some} for some in several]
    for suffix in ("jsonl", "parquet"):
        (tmp_path / suffix).mkdir()
        rows = records if isinstance(tools, list) or suffix == "jsonl" else records[:2]
        write(tmp_path / suffix / f"a.{suffix}", rows)
        (with_tools, *without), said = read(tmp_path / suffix)
        assert with_tools == Conversation([*ASK, *SAY], TOOLS)
        assert without == [Conversation([*ASK, *SAY])] * (len(rows) - 1)
        assert said == "conversations (messages, tools)"


def test_documents_are_identified_by_all_that_they_hold() -> None:
    talk = [*ASK, *SAY]
    assert Conversation(talk).identity == talk  # as before there were tools
    found: list[Any] = [
        Conversation(talk),
        Conversation(talk, TOOLS),
        Conversation(talk, given=1),
        PromptResponse("hi", "hello"),
    ]
    assert len({json.dumps(document.identity) for document in found}) == len(found)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "hi", "completion": SAY}, "line 1: one of the columns 'prompt' and 'completion'"),
    ({"prompt": ASK, "response": "x"}, "line 1: one of the columns 'prompt' and 'response'"),
    ({"prompt": "hi", "response": 3}, "line 1: column 'response' holds int, expected text"),
    ({"question": ["hi"], "answer": "x"}, "column 'question' holds list of str, expected text"),
    ({"instruction": "a", "output": "b", "input": 3}, "column 'input' holds int"),
    ({"messages": ASK, "tools": 3}, "line 1: column 'tools'"),
    ({"messages": ASK, "tools": "look"}, "line 1: column 'tools'"),
    ({"messages": ASK, "tools": ["{"]}, "line 1: column 'tools'"),
    ({"prompt": "hi"}, "no column 'messages' or 'prompt' with 'response' or 'prompt' with 'comp"),
]


@pytest.mark.parametrize(("record", "said"), BAD)
def test_columns_that_hold_something_else_are_refused(
    record: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", [record])
    with pytest.raises(InputError, match=said):
        read(tmp_path)
