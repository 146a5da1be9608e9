"""Mix files: what they may say, and what is refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddk_cache.corpus.mix import Entry, read_mix
from ddk_cache.errors import InputError


def read(folder: Path, text: str) -> list[Entry]:
    (folder / "mix.yaml").write_text(text)
    return read_mix(folder / "mix.yaml")


def test_a_mix_file_names_paths_data_sets_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "models" / "math").mkdir(parents=True)
    entries = read(
        tmp_path,
        """
        domains:
          code: {path: data/code, column: body, tokens: 40_000}
          home: {path: ~/x.jsonl}
          root: {path: /data/x.jsonl, tokens: null}
          "2024": {dataset: owner/name, config: en, split: test, teacher: owner/model}
          math: {path: m.jsonl, teacher: models/math}
        """,
    )
    assert entries == [
        Entry(name="code", path=tmp_path / "data/code", column="body", tokens=40_000),
        Entry(name="home", path=Path("/home/someone/x.jsonl")),
        Entry(name="root", path=Path("/data/x.jsonl")),
        Entry(name="2024", dataset="owner/name", config="en", split="test", teacher="owner/model"),
        Entry(
            name="math",
            path=tmp_path / "m.jsonl",
            teacher=str(tmp_path / "models/math"),
        ),
    ]


def test_merge_keys_are_merged(tmp_path: Path) -> None:
    entries = read(
        tmp_path,
        """
        base: &base {column: body, tokens: 10}
        more: &more {<<: *base, tokens: 20}
        domains:
          a: {<<: *base, path: a.jsonl}
          b: {<<: *more, path: b.jsonl, column: other}
        """,
    )
    assert entries == [
        Entry(name="a", path=tmp_path / "a.jsonl", column="body", tokens=10),
        Entry(name="b", path=tmp_path / "b.jsonl", column="other", tokens=20),
    ]


BAD = {
    "domains: [": "not readable YAML",
    "[" * 3000: "nested too deeply",
    "domains: {a: 2024-13-45}": "not readable YAML",
    "domains: !!python/object:os.system {}": "not readable YAML",
    "things: {}": "needs a mapping 'domains:'",
    "domains: {a: {}}": "give either 'path:' or 'dataset:'",
    "domains: {a: {path: x, dataset: o/n}}": "give either 'path:' or 'dataset:'",
    "domains: {a: {path: null}}": "'path': got None, expected text",
    "domains: {a: {path: x, colum: y}}": "Did you mean 'column'",
    "domains: {a: {path: x, tokens: -1}}": "'tokens': got -1, expected a whole number",
    "domains: {a: {path: x, tokens: true}}": "'tokens': got True, expected a whole number",
    "domains: {a: {path: x, tokens: 1.5}}": "'tokens': got 1.5, expected a whole number",
    "domains: {a: {path: x, teacher: 7}}": "'teacher': got 7, expected text. Put it in quotes",
    "domains: {a: {path: x, split: test}}": "'split' goes with 'dataset:', not with 'path:'",
    "domains: {a: {path: x, config: en}}": "'config' goes with 'dataset:', not with 'path:'",
    "domains: {a: {dataset: o/n, config: 1}}": "'config': got 1, expected text. Put it in quotes",
    "domains: {a: {path: 's3://b/x.jsonl'}}": "is a URL, which is not supported",
    "domains: {a: {path: 'http://b/x.jsonl'}}": "is a URL, which is not supported",
    "domains: {a: {path: ~nobody-here/x}}": "home directory",
    "domains: {a: {dataset: text}}": "expected 'owner/name'",
    "domains: {a: {dataset: json}}": "expected 'owner/name'",
    "domains: {a: {dataset: ../base}}": "expected 'owner/name'",
    "domains: {a: {dataset: /abs/path}}": "expected 'owner/name'",
    "domains: {a: {dataset: owner/here}}": "is a folder here",
    "domains: {yes: {path: x}}": "domain True: got bool, expected text. Put it in quotes",
    "domains: {2024: {path: x}}": "domain 2024: got int, expected text. Put it in quotes",
    "domains: {a: {path: x}, a: {path: y}}": "two domains or settings of one name: a",
    "domains: {a: {path: x, path: y}}": "two domains or settings of one name: path",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:40])
def test_a_bad_mix_file_is_refused_by_name(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    with pytest.raises(InputError, match=BAD[text]):
        read(tmp_path, text)
