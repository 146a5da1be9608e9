"""Local files: every format gives the same values, and a damaged file is refused by name."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from ddk_cache.corpus import files
from ddk_cache.corpus.files import Layout, kind_of, read
from ddk_cache.errors import InputError
from tests.helpers import jsonl

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
    "zst of two frames": lambda data: zstd.compress(data[:7]) + zstd.compress(data[7:]),
}

TEXTS = [f"document {n * 7919} with words {n * n}" for n in range(3000)]

AS_FILE = {
    "txt": "\n\n".join(TEXTS),
    "csv": "text\n" + "".join(f"{text}\n" for text in TEXTS),
    "jsonl": jsonl({"text": text} for text in TEXTS),
}


def values(path: Path, column: str = "text") -> list[object]:
    kind = kind_of(path)
    assert kind
    found = read(path, "paragraphs" if kind == "text" else kind, [Layout((column,))])
    return [fields.values.get(column) for fields in found]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", AS_FILE)
def test_a_truncated_file_is_refused(suffix: str, compression: str, tmp_path: Path) -> None:
    whole = COMPRESS[compression](AS_FILE[suffix].encode())
    path = tmp_path / f"a.{suffix}.{compression.split()[0]}"
    path.write_bytes(whole)
    assert values(path) == TEXTS
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match="is truncated: its compressed data end too early"):
            values(path)
    path.write_bytes(whole[:5])
    with pytest.raises(InputError, match=r"truncated|cannot be read"):
        values(path)


def test_json_comes_as_lines_an_array_or_columns(tmp_path: Path) -> None:
    texts = ["a", "é 中", 'with "quotes"\nand lines']
    spellings = {
        "lines": "\n".join(json.dumps({"id": 1, "text": text}) for text in texts),
        "lines with blanks and CR": "\r\n\r\n".join(json.dumps({"text": text}) for text in texts),
        "objects": json.dumps([{"text": text} for text in texts], indent=1),
        "texts": json.dumps(texts),
        "columns": json.dumps({"text": texts, "id": [1, 2, 3]}, indent=1),
    }
    for name, spelling in spellings.items():
        path = tmp_path / "a.json"
        path.write_text("\ufeff" + spelling, "utf-8")
        assert values(path) == texts, name


def test_columns_that_nobody_asks_for_do_not_matter(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"text": "x" * 100_000, "id": 1} for _ in range(120)]
    lines += [{"text": "late", "id": "s4", "meta": {"a": [1]}}, {"id": 2}]
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(lines))
    assert values(path)[-2:] == ["late", None]


def test_csv_is_read_as_text(tmp_path: Path) -> None:
    texts = ["1", "NA", "null", "3.50", 'a "b", c', "two\r\nlines", "é", "x" * 200_000]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "text"], [], *([n, t] for n, t in enumerate(texts))])
    assert values(path) == texts


def test_paragraphs_are_blocks_between_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\nmore\n\n\nthree\rfour\n")
    assert values(path) == ["one", "two\nmore", "\nthree\nfour\n"]


def test_paragraphs_do_not_depend_on_how_much_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text = tmp_path / "a.txt", "one\n\n\n\ntwo\n\n\nthree and more\n\n"
    path.write_text(text)
    for size in range(1, 12):
        monkeypatch.setattr(files, "CHUNK", size)
        assert values(path) == text.split("\n\n")


def test_parquet_parts_without_rows_are_read(tmp_path: Path) -> None:
    for name, texts in {"empty": [], "full": ["a", None, "b"]}.items():
        table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert values(tmp_path / "empty.parquet") == []
    assert values(tmp_path / "full.parquet") == ["a", None, "b"]
    packed = tmp_path / "full.parquet.gz"
    packed.write_bytes(gzip.compress((tmp_path / "full.parquet").read_bytes()))
    assert values(packed) == ["a", None, "b"]


BAD: dict[str, tuple[str, bytes, str]] = {
    "Latin-1 line": ("a.jsonl", b'{"text":"a"}\n{"text":"caf\xe9"}', "a.jsonl: line 2: not UTF-8"),
    "Latin-1 text": ("a.txt", b"one\n\ntwo caf\xe9 x\n", "a.txt: line 3: not UTF-8: byte 0xe9 at"),
    "Latin-1 csv": ("a.csv", b"text\nx\ncaf\xe9\n", "a.csv: line 3: not UTF-8"),
    "UTF-16": ("a.txt", "abc".encode("utf-16"), "line 1: not UTF-8"),
    "broken line": ("a.jsonl", b'{"text":"a"}\n{"text":\n', "line 2 cannot be read as JSON"),
    "half a character": ("a.jsonl", rb'{"text":"\ud83d"}', "line 1 cannot be read as JSON"),
    "deep JSON": ("a.jsonl", b'{"text":"a"}\n' + b"[" * 200_000, "line 2 cannot be read as JSON"),
    "a number": ("a.jsonl", b"3\n", "line 1: got int, expected an object"),
    "no column": ("a.jsonl", b'{"b":1}\n{"c":2}\n', "no column 'text'. Its columns: b"),
    "open quote": ("a.csv", b'text\nx\n"y\n', "line 3: unexpected end of data"),
    "commas": ("a.csv", b"text,b\nx,y\nx,y,z\n", "line 3: got 3 fields, expected 2"),
    "not gzip": ("a.jsonl.gz", b"plain", "a.jsonl.gz cannot be read"),
    "not Parquet": ("a.parquet", b"plain", "a.parquet cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused_by_name_and_line(case: str, tmp_path: Path) -> None:
    name, data, said = BAD[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=said):
        values(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.json.gz", "a.csv.gz"])
def test_a_line_above_the_limit_is_refused_before_it_is_held(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LIMIT", 1000)
    monkeypatch.setattr(files, "CHUNK", 100)
    start = {"a.jsonl.gz": '{"text":"a"}\n{"text":"', "a.json.gz": "[\n", "a.csv.gz": "text\n"}
    (tmp_path / name).write_bytes(gzip.compress((start.get(name, "") + "x" * 5000).encode()))
    with pytest.raises(InputError, match="longer than 1,000"):
        values(tmp_path / name)
