"""Runs in a terminal."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from ddk_train.report.run_report import load
from ddk_train.report.table import show
from tests.helpers import command, finish
from tests.runs import write_run


def test_terminal_has_every_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = (
        "[red]books[/]",
        "[/]",
        "code",
        "a domain name that is longer than most columns are",
    )
    show(load([write_run(tmp_path / "a", names), write_run(tmp_path / "[b]", names)]))
    out = capsys.readouterr().out
    assert all(out.count(name) >= 3 for name in names)
    assert "\n[b]\n" in out
    assert f"{math.exp(1.5):.2f}" in out
    assert "300 steps, 128 tokens/s, mean held-out loss 3.000" in out


def report(*words: object) -> tuple[int, str, str]:
    return finish(command("ddk-train", "report", *words))


def test_report_writes_json_and_page_on_request(tmp_path: Path) -> None:
    run, page = write_run(tmp_path / "a"), tmp_path / "page.html"
    code, out, _ = report("--json", run)
    assert (code, json.loads(out)[0]["name"]) == (0, "a")
    assert not list(tmp_path.rglob("*.html"))
    code, out, err = report("--json", "--html", page, run)
    assert (code, json.loads(out)[0]["name"]) == (0, "a")
    assert str(page) in err
    assert page.exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_encoding_and_any_run_name_can_be_printed(tmp_path: Path, encoding: str) -> None:
    runs = write_run(tmp_path / "ü[bold]→"), write_run(tmp_path / "b", seed=1)
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    words = ("ddk-train", "report", *runs)
    code, out, err = finish(command(*words, env=environment, encoding="latin-1"))
    assert code == 0, err
    assert "[bold]?" in out
