"""Which files are domains, and the documents in them."""

from __future__ import annotations

import bz2
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ddk_cache.corpus.document import Conversation
from ddk_cache.corpus.sources import documents, find_sources
from ddk_cache.errors import InputError
from tests.helpers import jsonl


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def as_jsonl(*texts: object) -> str:
    return jsonl({"text": text} for text in texts)


def read(corpus: Path) -> dict[str, list[Any]]:
    """Return the documents of every domain."""
    return {source.name: list(documents(source)) for source in find_sources(corpus)}


def test_every_format_gives_the_same_documents(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ddk_cache")
    texts = ["one", "two words", "three\nlines\nhere", "4" * 30, "NA"]
    lines = as_jsonl(*texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.bz2").write_bytes(bz2.compress(lines.encode()))
    (tmp_path / "c.json.zst").write_bytes(zstandard.compress(lines.encode()))
    pq.write_table(pa.table({"id": [1, 2, 3, 4, 5], "text": texts}), tmp_path / "d.parquet")
    (tmp_path / "e.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    (tmp_path / "f").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "f" / f"{number}.txt").write_text(text)
    (tmp_path / "g.txt").write_text("\n\n".join(texts))
    (tmp_path / "h.JSONL").write_text(lines)
    (tmp_path / "README").write_text("no data")
    sources = find_sources(tmp_path)
    assert [source.name for source in sources] == list("abcdefgh")
    for source in sources:
        assert [str(text).strip() for text in documents(source)] == texts, source.name
    assert [record.getMessage()[:18] for record in caplog.records] == ["README is left out"]


NAMES = ["a[1].jsonl", "a*.jsonl", "a::b.jsonl", "what?.jsonl", "a#b%20c.jsonl", "{x}.jsonl"]


def test_file_names_are_literal(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        write(tmp_path / "c [old]*" / "web" / name, as_jsonl(f"{number}"))
    write(tmp_path / "c [old]*" / "web" / "ab.jsonl", as_jsonl("ab"))
    write(tmp_path / "b[1].jsonl", as_jsonl("b"))
    (tmp_path / "mix.yaml").write_text("domains: {some: {path: 'b[1].jsonl'}}")
    assert sorted(read(tmp_path / "c [old]*")["web"]) == [*"012345", "ab"]
    assert read(tmp_path / "mix.yaml") == {"some": ["b"]}


def test_hidden_files_and_caches_are_not_data(
    tmp_path: Path, make_cache: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ddk_cache")
    write(tmp_path / "web" / "a.jsonl", as_jsonl("a"))
    for hidden in (".git/b", ".ipynb_checkpoints/a-checkpoint", "deep/.git/c", ".d"):
        write(tmp_path / "web" / f"{hidden}.jsonl", as_jsonl("hidden"))
    write(tmp_path / ".hidden" / "b.jsonl", as_jsonl("hidden"))
    write(tmp_path / "x.zarr~host+1+2.partial" / "b.jsonl", as_jsonl("hidden"))
    make_cache(tmp_path / "mix.zarr")
    make_cache(tmp_path / "web" / "deep" / "mix.zarr")
    assert read(tmp_path) == {"web": ["a"]}
    assert caplog.text.count("is left out: it is a Zarr store") == 2
    with pytest.raises(InputError, match="is a Zarr store, not a corpus"):
        find_sources(tmp_path / "mix.zarr")


def test_a_linked_folder_inside_a_domain_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "c" / "web" / "a.jsonl", as_jsonl("a"))
    (tmp_path / "c" / "web" / "loop").symlink_to(tmp_path / "c")
    assert read(tmp_path / "c") == {"web": ["a"]}
    assert "loop is left out" in caplog.text


def test_a_second_file_does_not_change_what_the_first_one_means(tmp_path: Path) -> None:
    write(tmp_path / "web" / "a.txt", "one\n\ntwo")
    assert read(tmp_path) == {"web": ["one\n\ntwo"]}
    write(tmp_path / "web" / "b.txt", "three")
    assert read(tmp_path) == {"web": ["one\n\ntwo", "three"]}


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", as_jsonl("a", "", " \n\t", None, "b"))
    write(tmp_path / "b.txt", "one\n\n \n\n\ntwo")
    pq.write_table(pa.table({"text": ["\n\n", "a", None]}), tmp_path / "c.parquet")
    assert read(tmp_path) == {"a": ["a", "b"], "b": ["one", "\ntwo"], "c": ["a"]}


def test_parts_without_rows_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, texts in {"1": [], "2": ["a"], "3": []}.items():
        table = pa.table({"text": pa.array(texts, pa.string())})
        pq.write_table(table, tmp_path / "a" / f"{name}.parquet")
    write(tmp_path / "b" / "1.jsonl", "")
    write(tmp_path / "b" / "2.jsonl", as_jsonl("b"))
    assert read(tmp_path) == {"a": ["a"], "b": ["b"]}


def test_a_file_that_two_domains_share_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "real" / "a.jsonl", as_jsonl("a"))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real" / "a.jsonl")
    assert read(tmp_path) == {"link": ["a"], "real": ["a"]}
    (warning,) = caplog.records
    assert warning.getMessage().endswith("a.jsonl is read by several domains: link, real")


def test_messages_come_before_text_and_a_named_column_before_both(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}]
    line = json.dumps({"text": "text", "messages": talk, "body": "body"})
    write(tmp_path / "a.jsonl", line + "\n" + as_jsonl("without messages"))
    assert read(tmp_path) == {"a": [Conversation(talk)]}
    (tmp_path / "mix.yaml").write_text("domains: {a: {path: a.jsonl, column: body}}")
    assert read(tmp_path / "mix.yaml") == {"a": ["body"]}


BAD: dict[str, tuple[dict[str, str], str]] = {
    "no such file": ({}, "no corpus at"),
    "empty directory": ({"c/.keep": ""}, "holds no domain"),
    "empty file": ({"c/a.jsonl": ""}, "domain 'a': .*a.jsonl holds no document"),
    "broken parquet": ({"c/a.parquet": "junk"}, "domain 'a': .*a.parquet cannot be read"),
    "broken json": ({"c/a.jsonl": '{"text": "x"'}, "cannot be read"),
    "broken gzip": ({"c/a.jsonl.gz": "junk"}, "cannot be read"),
    "no text column": ({"c/a.csv": "title,body\nx,y\n"}, "Its columns: title, body"),
    "numbers": ({"c/a.jsonl": as_jsonl("a", 3)}, "a.jsonl: line 2: column 'text' holds int"),
    "messages as JSON": ({"c/a.jsonl": '{"messages": "[]"}'}, "'messages' holds str, expected a l"),
    "messages as texts": ({"c/a.jsonl": '{"messages": ["a"]}'}, "'messages' holds list of str"),
    "two of a name": (
        {"c/a.jsonl": as_jsonl("x"), "c/a/b.txt": "x"},
        "two domains are named 'a': .*Rename one",
    ),
    "one but for case": (
        {"c/Code.jsonl": as_jsonl("x"), "c/code.jsonl": as_jsonl("x")},
        "two domains are named 'Code' and 'code', which differ only in case: .*Rename one",
    ),
    "unsafe name": (
        {"c/a b.jsonl": as_jsonl("x")},
        r"not usable as a path part.* mix file can name it otherwise: domains: \{NAME: \{path: '/",
    ),
    "mixed formats": ({"c/a/x.txt": "x", "c/a/y.csv": "text\nx\n"}, "files of one kind"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_corpus_is_refused_by_name(case: str, tmp_path: Path) -> None:
    files, said = BAD[case]
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(InputError, match=said):
        read(tmp_path / "c")


def test_a_parquet_file_without_rows_holds_no_document(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet holds no document"):
        read(tmp_path)


def test_a_mix_file_is_checked_against_the_disk(tmp_path: Path) -> None:
    write(tmp_path / "data.txt", "some text")
    for settings, said in {
        "a: {path: x.txt}": "domain 'a': there is no",
        "../x: {path: data.txt}": "not usable as a path part",
    }.items():
        (tmp_path / "mix.yaml").write_text(f"domains: {{{settings}}}")
        with pytest.raises(InputError, match=said):
            find_sources(tmp_path / "mix.yaml")
