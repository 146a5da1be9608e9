"""What others have written: documents as token ids, with a teacher's log-probabilities of each.

Files are Parquet or JSON lines; the columns of a record decide its format:

    input_ids, target_token_ids, target_logprobs     axolotl, TRL; perhaps target_mask, labels
    prompt_token_ids, prompt_logprobs                vLLM; also inside of choices[0] of an answer
                                                     of its server, and of a line of a batch output
    input_ids, compressed_logprobs,                  DistillKit, with its compression_config.yaml
    bytepacked_indices                               beside the files

Records are read one at a time, as Python lists: slow compared with a build's arrays, and good for
every layout of nested columns.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddk_cache.errors import InputError
from ddk_cache.transfer.distillkit import read_packing
from ddk_cache.types import Array

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")

COLUMNS, PROMPT, PACKED = "target_token_ids", "prompt_logprobs", "bytepacked_indices"
"""The formats, named by the column that shows them."""

IGNORED = -100
"""The label of a token whose loss does not count, as transformers has it."""


class Given(NamedTuple):
    """A document and the distributions given for it."""

    kind: str
    """`COLUMNS`, `PROMPT` or `PACKED`."""
    tokens: Array
    """(L) int64."""
    ids: Array
    """(N, K) int64, −1 where there is no entry; N is L or L − 1."""
    logprobs: Array
    """(N, K) float64, nats; −inf where there is no entry."""
    counted: Array
    """(L) bool, whether the loss of each token counts."""


def find_files(source: Path) -> list[Path]:
    """Return the files of a path, sorted. Raises InputError where there is none of a known kind."""
    found = sorted(source.rglob("*")) if source.is_dir() else [source]
    files = [path for path in found if path.is_file() and path.name.endswith(SUFFIXES)]
    if not files:
        raise InputError(f"{source}: got no file, expected {', '.join(SUFFIXES)}.")
    return files


def read_given(files: Iterable[Path]) -> Iterator[Given]:
    """Yield the documents of files, in order.

    Raises:
        InputError: a file cannot be read, or a record is of no known format.
    """
    for file in files:
        for number, record in enumerate(_records(file), 1):
            try:
                yield _packed(record, file) if PACKED in record else _given(record)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(
                    f"{file}, record {number}: got {error!r}, expected input_ids with "
                    "target_token_ids and target_logprobs, prompt_token_ids with "
                    "prompt_logprobs, or DistillKit's columns."
                ) from error


def _records(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=64):
                yield from batch.to_pylist()
            return
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
            yield from map(json.loads, filter(str.strip, lines))
    except (OSError, ValueError) as error:  # pyarrow's errors are these
        raise InputError(f"{file} cannot be read: {error}.") from error


def _packed(record: Mapping[str, Any], file: Path) -> Given:
    tokens = np.array(record["input_ids"], np.int64)
    packing = read_packing(file.parent)
    ids = packing.ids(np.array(record[PACKED], np.uint8))
    logprobs = packing.logprobs(np.array(record["compressed_logprobs"], np.uint8))
    return _checked(PACKED, tokens, ids.tolist(), logprobs.tolist(), np.ones(len(tokens), bool))


def _given(record: Mapping[str, Any]) -> Given:
    if COLUMNS in record:
        tokens = np.array(record["input_ids"], np.int64)
        counted = np.ones(len(tokens), bool)
        if (labels := record.get("labels")) is not None:
            counted &= np.array(labels) != IGNORED
        ids, logprobs = record[COLUMNS], record["target_logprobs"]
        if (mask := record.get("target_mask")) is not None:
            shown = [any(row) if isinstance(row, list) else bool(row) for row in mask]
            ids = [row if there else () for row, there in zip(ids, shown, strict=True)]
            logprobs = [row if there else () for row, there in zip(logprobs, shown, strict=True)]
        return _checked(COLUMNS, tokens, ids, logprobs, counted)
    while "response" in record or "body" in record:
        record = record.get("response") or record["body"]
    if record.get("choices"):
        record = {**record, **record["choices"][0]}
    tokens = np.array(record["prompt_token_ids"], np.int64)
    places = [place or {} for place in record[PROMPT]]
    ids = [[int(token) for token in place] for place in places]
    logprobs = [
        [entry["logprob"] if isinstance(entry, dict) else entry for entry in place.values()]
        for place in places
    ]
    return _checked(PROMPT, tokens, ids, logprobs, np.ones(len(tokens), bool))


def _checked(
    kind: str,
    tokens: Array,
    ids: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float | None]],
    counted: Array,
) -> Given:
    """Return a document with its ragged rows padded; ValueError where lengths disagree."""
    if (
        tokens.ndim != 1
        or tokens.min(initial=0) < 0
        or len(ids) not in (len(tokens), len(tokens) - 1)
    ):
        raise ValueError(f"{len(tokens)} tokens and {len(ids)} distributions")
    if len(counted) != len(tokens) or [len(row) for row in ids] != [len(row) for row in logprobs]:
        raise ValueError("columns of different lengths")
    counts = np.array([len(row) for row in ids], np.int64)
    inside = np.arange(counts.max(initial=0)) < counts[:, None]
    all_ids, all_logprobs = np.full(inside.shape, -1), np.full(inside.shape, -np.inf)
    all_ids[inside] = [token for row in ids for token in row]
    all_logprobs[inside] = [-np.inf if v is None else v for row in logprobs for v in row]
    all_ids[np.isneginf(all_logprobs)] = -1
    return Given(kind, tokens, all_ids, all_logprobs, counted)
