"""Some columns of a local file: text, JSON, CSV or Parquet, plain or compressed.

Files are opened by their literal name and read as a stream; only the columns that are asked for are
looked at, and a message names the line. `datasets`, which reads the hub, takes local names for
glob patterns, casts every column, and reads a compressed file that was cut short as a whole one.
The price is one short reader per format.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from ddk_cache.errors import InputError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
}
"""File suffix → how the file is read."""

COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": zstd.open,
}
"""File suffix → what opens it. Each raises EOFError where the file is truncated."""

LIMIT = 2**30
"""Bytes (characters of a text file) that one line, or a file that is parsed whole, may have."""

CHUNK = 2**20
"""Characters of a text file read at once."""

PARQUET_ROWS = 32
"""Rows of a Parquet file decoded at once."""


class Layout(NamedTuple):
    """Columns that make up a document together."""

    needed: tuple[str, ...]
    """A file has this layout if it has all of these."""
    optional: tuple[str, ...] = ()
    """Read too where they are there."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Return all of them."""
        return (*self.needed, *self.optional)


class Fields(NamedTuple):
    """What the columns of a layout hold at one place."""

    where: str
    """For messages: "web/a.jsonl: line 3"."""
    layout: Layout
    values: Mapping[str, Any]
    """By column; a column that has none there may be missing."""


def kind_of(path: Path) -> str | None:
    """Return how a file is read, by its name; None where it is not a data file."""
    last = path.suffix.lower()
    return KINDS.get(path.with_suffix("").suffix.lower() if last in COMPRESSED else last)


def read(path: Path, kind: str, wanted: Sequence[Layout]) -> Iterator[Fields]:
    """Yield what a file holds in the columns of the first of the layouts `wanted` that it has.

    `kind` is one of READERS. A file of kind `text` has one value in a column `text`, of kind
    `paragraphs` one per block between blank lines. A JSON file holds an object per line, an array
    of objects or texts, or one object of equally long lists.

    Raises:
        InputError: the file is unreadable, truncated, malformed or not UTF-8, has none of the
            layouts, or has a line longer than LIMIT.
    """
    opened = COMPRESSED.get(path.suffix.lower(), _open)
    try:
        with opened(path) as file:
            for fields in READERS[kind](file, wanted):
                yield fields._replace(where=f"{path}: {fields.where}")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except EOFError as error:
        raise InputError(
            f"{path} is truncated: its compressed data end too early. Copy or download it again."
        ) from error
    except UnicodeDecodeError as error:
        with opened(path) as file:
            raise InputError(f"{path}: {_first_undecodable(file)}") from error
    except Exception as error:  # each format has errors of its own
        raise InputError(f"{path} cannot be read: {error}") from error


def select(records: Iterable[tuple[str, Any]], wanted: Sequence[Layout]) -> Iterator[Fields]:
    """Yield the fields of records: those of the first of `wanted` that any record has.

    A record is a mapping or a plain text; one without a column gives None.

    Raises:
        InputError: a record is neither, or none has a wanted layout.
    """
    layout: Layout | None = None
    columns: list[str] = []
    for where, record in records:
        if isinstance(record, str):
            record = {"text": record}
        if not isinstance(record, Mapping):
            raise InputError(f"{where}: got {type(record).__name__}, expected an object.")
        columns = columns or list(record)
        layout = layout or _first(record, wanted)
        if layout:
            yield Fields(where, layout, {name: record.get(name) for name in layout.columns})
    if columns and not layout:
        pick(columns, wanted)


def pick(columns: Sequence[str], wanted: Sequence[Layout]) -> Layout:
    """Return the first wanted layout that some columns have, less what is not there of the
    optional ones. Raises InputError where they have none.
    """  # noqa: D205
    layout = _first(columns, wanted)
    if layout:
        return layout._replace(optional=tuple(n for n in layout.optional if n in columns))
    known = " or ".join(" with ".join(map(repr, layout.needed)) for layout in wanted)
    raise InputError(
        f"no column {known}. Its columns: {', '.join(columns)}. Name one with 'column:' in a mix "
        "file."
    )


def _first(columns: Container[str], wanted: Sequence[Layout]) -> Layout | None:
    fits = (layout for layout in wanted if all(name in columns for name in layout.needed))
    return next(fits, None)


# --- one reader per format ------------------------------------------------------------------------


def _text(file: IO[bytes], wanted: Sequence[Layout]) -> Iterator[Fields]:
    layout, text = pick(["text"], wanted), _whole(io.TextIOWrapper(file, "utf-8-sig"))
    yield Fields("the whole file", layout, {"text": text})


def _paragraphs(file: IO[bytes], wanted: Sequence[Layout]) -> Iterator[Fields]:
    layout, numbers, text = pick(["text"], wanted), itertools.count(1), ""
    stream = io.TextIOWrapper(file, "utf-8-sig")
    while more := stream.read(max(CHUNK, len(text))):  # doubled: time linear in a long block
        *blocks, text = (text + more).split("\n\n")
        for block in blocks:
            yield Fields(f"paragraph {next(numbers)}", layout, {"text": block})
        if len(text) > LIMIT:
            raise InputError(f"paragraph {next(numbers)}: longer than {LIMIT:,} characters.")
    yield Fields(f"paragraph {next(numbers)}", layout, {"text": text})


def _json(file: IO[bytes], wanted: Sequence[Layout]) -> Iterator[Fields]:
    return select(_json_records(file), wanted)


def _json_records(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    lines = ((number, line) for number, line in _lines(file) if line.strip())
    number, first = next(lines, (1, ""))
    if first.lstrip().startswith("[") or (first.lstrip().startswith("{") and not _is_json(first)):
        text = first + _whole(io.TextIOWrapper(file, "utf-8"))
        for place, record in enumerate(_table(_parse(text, "the whole file")), 1):
            yield f"record {place}", record
        return
    if not first:
        return
    for place, line in itertools.chain([(number, first)], lines):
        yield f"line {place}", _parse(line, f"line {place}")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:  # an escaped half of a surrogate pair is JSON, and not a character
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be read as JSON: {error}") from error
    return value


def _table(value: Any) -> list[Any]:
    """Return the records of a JSON file that is one value."""
    if isinstance(value, list):
        return value
    if all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return [value]


def _csv(file: IO[bytes], wanted: Sequence[Layout]) -> Iterator[Fields]:
    csv.field_size_limit(LIMIT)  # its default of 128 kB is less than a document
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    rows = _csv_rows(reader)
    header = next(rows, [])
    if not header:
        return
    layout = pick(header, wanted)
    places = {name: header.index(name) for name in layout.columns}
    for row in rows:
        if len(row) > len(header):
            raise InputError(
                f"line {reader.line_num}: got {len(row)} fields, expected {len(header)}. Put "
                "quotes around a field that holds a comma."
            )
        values = {name: row[place] for name, place in places.items() if place < len(row)}
        yield Fields(f"line {reader.line_num}", layout, values)


def _csv_rows(reader: Any) -> Iterator[list[str]]:
    """Yield the rows of a CSV reader that are not blank lines."""
    try:
        yield from (row for row in reader if row)
    except csv.Error as error:
        raise InputError(f"line {reader.line_num}: {error}.") from error


def _parquet(file: IO[bytes], wanted: Sequence[Layout]) -> Iterator[Fields]:
    import pyarrow.parquet as pq

    plain = isinstance(file, io.BufferedReader)
    table = pq.ParquetFile(file if plain else io.BytesIO(_whole(file)))
    layout = pick(table.schema_arrow.names, wanted)
    numbers = itertools.count(1)
    for batch in table.iter_batches(PARQUET_ROWS, columns=list(layout.columns)):
        for values in batch.to_pylist():
            yield Fields(f"row {next(numbers)}", layout, values)


READERS: dict[str, Callable[[IO[bytes], Sequence[Layout]], Iterator[Fields]]] = {
    "text": _text,
    "paragraphs": _paragraphs,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
}


# --- bytes ----------------------------------------------------------------------------------------


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")


def _whole(file: Any) -> Any:
    """Return all of a file that may not exceed LIMIT."""
    data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise InputError(f"longer than {LIMIT:,} bytes, which is too long to be parsed whole.")
    return data


def _lines(file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line, its end included."""
    for number in itertools.count(1):
        line = file.readline(LIMIT + 1)
        if not line:
            return
        if len(line) > LIMIT:
            raise InputError(f"line {number}: longer than {LIMIT:,} bytes.")
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"line {number}: not UTF-8: byte {line[error.start]:#04x} at column "
                f"{error.start + 1}. Convert the file, for example: iconv -f latin1 -t utf-8."
            ) from error


def _first_undecodable(file: IO[bytes]) -> str:
    """Return what is wrong with the first line that is not UTF-8."""
    try:
        for _ in _lines(file):
            pass
    except InputError as error:
        return str(error)
    return "not UTF-8."
