"""What `info` shows: every figure, whatever the terminal, and nothing that a terminal obeys."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from ddk_cache import Cache, open_cache
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.corpus.sources import find_sources
from ddk_cache.inspect.describe import Facts, describe, printable, show
from ddk_cache.testing import BUILD, random_teacher


@pytest.fixture(scope="module")
def facts(cache: Cache) -> Facts:
    return describe(cache)


def test_the_facts_are_those_of_the_records(cache: Cache, facts: Facts) -> None:
    assert list(facts["domains"]) == list(cache)
    assert facts["tokens"] == cache.spec.seq_len * sum(
        len(split) for domain in cache.values() for split in domain.values()
    )
    for name, domain in cache.items():
        assert facts["domains"][name]["teacher_loss"] == domain.validation.teacher_loss
    assert facts["bytes_per_token"]["all"] == pytest.approx(facts["bytes"] / facts["tokens"])
    assert facts["warnings"] == []


@pytest.mark.parametrize("columns", ["200", "80", "40", "20", "1", "0", "-3", "x", ""])
def test_no_figure_is_cut_in_a_terminal_of_any_width(
    columns: str, facts: Facts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    show(facts)
    shown = capsys.readouterr().out
    assert f"{facts['bytes']:,} bytes" in shown
    for name, domain in facts["domains"].items():
        assert name in shown
        assert f"{domain['seen']['accuracy']:.1%}" in shown
        assert f"{domain['teacher_perplexity']:,.2f}" in shown


def test_text_of_people_is_shown_as_it_is_and_obeyed_by_nobody(
    facts: Facts, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = copy.deepcopy(facts)
    hostile["path"] = "a[/b][red]c.zarr"
    hostile["provenance"]["teacher"] = "x[/nope]\x1b]0;owned\x07\x1b[31m\nfake :smile:"
    show(hostile)
    shown = capsys.readouterr().out
    assert "a[/b][red]c.zarr" in shown
    assert r"x[/nope]\x1b]0;owned\x07\x1b[31m\nfake :smile:" in shown
    assert "\x1b" not in shown


def test_printable_text_stays() -> None:
    assert printable("naïve 中文 a_b") == "naïve 中文 a_b"
    assert printable("a\tb\r\u202e") == r"a\tb\r\u202e"


def test_a_domain_without_held_out_rows_is_warned_about(
    corpus: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = BUILD | {"holdout": 0.0}
    build_cache(
        tmp_path / "c", find_sources(corpus), random_teacher(), tokenizer, BuildConfig(**settings)
    )
    facts = describe(open_cache(tmp_path / "c"))
    assert facts["domains"]["notes"]["teacher_loss"] is None
    assert "notes has no held-out rows" in " ".join(facts["warnings"])
    show(facts)
    assert "warning: notes has no held-out rows" in capsys.readouterr().out
