"""Runs in a terminal."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ddk_train.report.run_report import load
from ddk_train.report.table import show
from tests.runs import write_run


def test_terminal_has_every_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("[red]books[/]", "code", "a name of a domain that is longer than most columns are")
    show(load([write_run(tmp_path / "a", names), write_run(tmp_path / "[b]", names)]))
    out = capsys.readouterr().out
    assert all(out.count(name) >= 3 for name in names)
    assert "\n[b]\n" in out
    assert f"{math.exp(1.5):.2f}" in out
    assert "300 steps, 128 tokens/s, mean held-out loss 2.500" in out
