"""What one run directory tells, and what is refused as none."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from ddk_cache import DDKError, InputError
from ddk_train.report.run_report import load, to_json
from tests.runs import write_run


def test_json_holds_the_facts(tmp_path: Path) -> None:
    (facts,) = to_json(load([write_run(tmp_path / "a")]))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["domains"]["code"]["last_loss"] == 2.5
    assert facts["domains"]["code"]["ratio"] == pytest.approx(math.exp(0.5))
    assert facts["mean_loss"] == pytest.approx(2.5)
    assert facts["tokens_per_second"] == 128
    assert facts["domains"]["code"]["kl"] == 0.25
    assert facts["eval_share"] == pytest.approx(6 / (6 + 150))
    assert facts["settings"]["weighting"] == "excess"


DAMAGE = {
    "metrics.jsonl": [b'{"step": 10, "loss"\n', b'{"loss": 1.0}\n', b"[]\n"],
    "history.parquet": [b"", b"PAR1 cut short"],
    "config.json": [b"{}", b"[]", b'{"settings": 3}', b'{"settings": {}, "provenance": [1]}'],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_a_named_error(tmp_path: Path, name: str) -> None:
    for n, content in enumerate(DAMAGE[name]):
        run = write_run(tmp_path / str(n))
        (run / name).write_bytes(content)
        with pytest.raises(DDKError, match=re.escape(str(run))):
            load([run])


def test_names_hold_nothing_that_a_terminal_would_obey(tmp_path: Path) -> None:
    (report,) = load([write_run(tmp_path / "a\x1b[31m\nb")])
    assert report.name == "a?[31m?b"


def test_equal_directory_names_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / part / "final") for part in ("x", "y")]
    assert [report.name for report in load([*runs, runs[0]])] == ["x/final", "y/final"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        load([tmp_path])
    with pytest.raises(DDKError, match="no measurement yet"):
        load([write_run(tmp_path / "a", measurements=0)])
