"""Sealed documents: what was written comes back, and nothing else is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddk_cache import CorruptCacheError, FormatVersionError
from ddk_cache.format.documents import dump, file_name, parse, read, typed, understand
from ddk_cache.storage.local import LocalStorage

BODY = {"name": "ü", "rows": [1, 2], "loss": 0.1}


def test_what_is_written_comes_back() -> None:
    assert parse(dump(BODY), "here") == BODY


def test_every_changed_byte_is_noticed() -> None:
    data = dump(BODY)
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises((CorruptCacheError, FormatVersionError), match="here"):
            parse(changed, "here")


@pytest.mark.parametrize("data", [b"", b"{", b"3", b"[]", b"{}", b"\xff", b"[" * 10**5])
def test_what_is_no_document_is_damaged(data: bytes) -> None:
    with pytest.raises(CorruptCacheError, match="here is damaged"):
        parse(data, "here")


def test_another_version_is_named() -> None:
    data = json.dumps({"format_version": 7}).encode()
    with pytest.raises(FormatVersionError, match="here has format version 7; this ddk reads"):
        parse(data, "here")


def test_a_missing_document_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptCacheError, match=r"plan\.json cannot be read: it is missing"):
        read(LocalStorage(tmp_path), "plan.json")


@pytest.mark.parametrize(
    ("value", "kind", "least", "most"),
    [(True, int, 0, 9), (1.0, int, 0, 9), (-1, int, 0, 9), (10, int, 0, 9), (1, str, 0, 9),
     (float("nan"), float, 0, 9), (None, str, 0, 9), (2**63, int, 0, 2**62)],
)  # fmt: skip
def test_a_value_of_another_type_or_beyond_its_bounds(
    value: Any, kind: Any, least: float, most: float
) -> None:
    with pytest.raises(ValueError, match=r"where a .* belongs"):
        typed(value, kind, least, most)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "..", 3])
def test_a_name_that_leads_elsewhere(name: Any) -> None:
    with pytest.raises(ValueError, match=r"is not the name|belongs"):
        file_name(name)


def test_whatever_fails_is_about_that_file() -> None:
    def fail() -> None:
        raise KeyError("rows")

    with pytest.raises(CorruptCacheError, match="here is damaged: KeyError"):
        understand("here", fail)
