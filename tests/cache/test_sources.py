"""Documents → rows: formats, splits, packing, conversations, and what is refused."""

from __future__ import annotations

import bz2
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ddk_cache.corpus.rows import Packer, Tally, encode, token_rows
from ddk_cache.corpus.sources import documents, find_sources
from ddk_cache.errors import InputError


def read(path: Path, tokenizer: Any, **settings: Any) -> dict[Any, Any]:
    """Return the rows of every domain and split of a corpus, and the tallies."""
    settings = {"seq_len": 8, "holdout": 0.5, "block": 4} | settings
    out: dict[Any, Any] = {}
    for source in find_sources(path):
        tally = out[source.name] = Tally()
        for split, tokens, mask in token_rows(source, tokenizer, tally=tally, **settings):
            out.setdefault((source.name, split), []).extend(zip(tokens, mask, strict=True))
    return out


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["one", "two words", "three\nlines\nhere", "4" * 30, "NA"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.bz2").write_bytes(bz2.compress(lines.encode()))
    (tmp_path / "c.json.zst").write_bytes(zstandard.compress(lines.encode()))
    pq.write_table(pa.table({"id": [1, 2, 3, 4, 5], "text": texts}), tmp_path / "d.parquet")
    (tmp_path / "e.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    (tmp_path / "f").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "f" / f"{number}.txt").write_text(text)
    (tmp_path / "g.txt").write_text("\n\n".join(texts))
    (tmp_path / "README").write_text("no data")
    heard: list[str] = []
    sources = find_sources(tmp_path, heard.append)
    assert [source.name for source in sources] == list("abcdefg")
    for source in sources:
        assert [str(text).strip() for text in documents(source)] == texts, source.name
    assert len(heard) == 1
    assert "README" in heard[0]


def test_a_mix_file_names_paths_columns_and_limits(tmp_path: Path, tokenizer: Any) -> None:
    rows = "".join(json.dumps({"body": f"document {n:04}"}) + "\n" for n in range(100))
    (tmp_path / "data.jsonl").write_text(rows)
    mix = tmp_path / "mix.yaml"
    mix.write_text("domains:\n  some: {path: data.jsonl, column: body, tokens: 140}\n")
    tally = read(mix, tokenizer)["some"]
    assert tally.tokens == 140  # ten documents of 13 letters and an end-of-text each
    assert tally.documents == 10


def test_no_document_is_in_both_splits_and_appending_moves_nothing(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "corpus" / "a.jsonl"
    path.parent.mkdir()
    texts = [f"document number {n}" for n in range(60)]

    def write(some: list[str]) -> dict[Any, Any]:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
        return read(path.parent, tokenizer)

    before, after = write(texts + texts[:20]), write(texts + texts[:20] + ["more " * 9] * 5)
    words = {}
    for split in ("train", "validation"):
        old, new = before["a", split], after["a", split]
        for (row, mask), (row_after, mask_after) in zip(old, new[: len(old)], strict=True):
            assert (row == row_after).all()
            assert (mask == mask_after).all()
        stream = np.concatenate([old[0][0][:1], *(row[1:] for row, _ in old)])
        words[split] = set(tokenizer.decode(stream).split("<|endoftext|>")[:-1])
    assert words["train"]
    assert words["validation"]
    assert not words["train"] & words["validation"]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 5))
def test_packed_rows_are_the_stream_cut_every_s_tokens(
    lengths: list[int], seq_len: int, block: int
) -> None:
    packer = Packer(seq_len)
    stream: list[int] = []
    counted: list[bool] = []
    rows: list[tuple[Any, Any]] = []
    for length in lengths:
        tokens = list(range(len(stream), len(stream) + length))
        flags = [token % 3 > 0 for token in tokens]
        stream += tokens
        counted += flags
        packer.add((tokens, flags))
        while packer.rows >= block:
            rows += zip(*packer.take(block), strict=True)
    rows += zip(*packer.take(packer.rows), strict=True)
    assert len(rows) == max(0, (len(stream) - 1) // seq_len)
    for number, (tokens, mask) in enumerate(rows):
        first = number * seq_len
        assert tokens.tolist() == stream[first : first + seq_len + 1]
        assert mask.tolist() == counted[first + 1 : first + seq_len + 1]


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


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistants_part_of_a_conversation_counts(template: str) -> None:
    from ddk_cache.testing import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    ((ids, counted),) = encode(tokenizer, [MESSAGES])
    spoken = tokenizer.decode([t for t, flag in zip(ids, counted, strict=True) if flag])
    assert tokenizer.decode(ids).startswith("[user]hi;[assistant]hello;[user]bye;")
    assert spoken == "hello;so long;"
    assert ids[-1] == tokenizer.eos_token_id
    assert not counted[-1]


@pytest.mark.parametrize(("template", "said"), [("", "no chat template"), (FORGETFUL, "rewrites")])
def test_a_template_that_cannot_mark_the_assistant_is_refused(template: str, said: str) -> None:
    from ddk_cache.testing import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=said):
        encode(tokenizer, [MESSAGES])


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


BAD = {
    "no such file": ({}, "no corpus at"),
    "empty directory": ({"c/.keep": ""}, "holds no domain"),
    "empty file": ({"c/a.jsonl": ""}, "holds no document"),
    "broken parquet": ({"c/a.parquet": "junk"}, "cannot be read"),
    "broken json": ({"c/a.jsonl": '{"text": "x"'}, "cannot be read"),
    "broken gzip": ({"c/a.jsonl.gz": "junk"}, "cannot be read"),
    "no text column": ({"c/a.csv": "title,body\nx,y\n"}, "Its columns: title, body"),
    "numbers": ({"c/a.jsonl": '{"text": 3}\n'}, "holds int"),
    "too short": ({"c/a.jsonl": '{"text": "x"}\n'}, "too short: 2 tokens in 1 documents"),
    "two of a name": ({"c/a.jsonl": '{"text": "x"}', "c/a/b.txt": "x"}, "two domains are named"),
    "unsafe name": ({"c/a b.jsonl": '{"text": "x"}'}, "not usable as a path part"),
    "mixed formats": ({"c/a/x.txt": "x", "c/a/y.csv": "text\nx\n"}, "files of one kind"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_corpus_is_refused_by_name(case: str, tmp_path: Path, tokenizer: Any) -> None:
    files, said = BAD[case]
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(InputError, match=said):
        read(tmp_path / "c", tokenizer)


BAD_MIX = {
    "domains: [": "no readable YAML",
    "things: {}": "needs a mapping 'domains:'",
    "domains: {a: {}}": "give either 'path:' or 'dataset:'",
    "domains: {a: {path: x.txt}}": "there is no",
    "domains: {a: {path: x, colum: y}}": "Did you mean 'column'",
    "domains: {a: {path: x, tokens: -1}}": "'tokens' has to be",
    "domains: {a: {path: x}, a: {path: y}}": "two domains or settings of one name: a",
    "domains: {../x: {path: data.txt}}": "not usable as a path part",
}


@pytest.mark.parametrize("text", BAD_MIX)
def test_a_bad_mix_file_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("some text")
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(InputError, match=BAD_MIX[text]):
        find_sources(tmp_path / "mix.yaml")
