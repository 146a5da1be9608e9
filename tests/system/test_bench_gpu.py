"""The bench for a GPU, rehearsed on a CPU: every part runs, and says what a reader must know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benches.common import Record
from benches.gpu import PARTS, main
from benches.gpu.job import Job
from click.testing import CliRunner

from ddk_cache.hf import pick_device


def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--json", str(out)]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    facts = {part["bench"].removeprefix("gpu "): part for part in json.loads(out.read_text())}
    assert tuple(facts) == PARTS
    for name, part in facts.items():
        assert part["versions"]["torch"]
        assert part["device"]["device"] == "cpu"
        assert part["settings"]["tiny"]
        assert len(part["tables"]) >= 2
        assert f"gpu {name}" == part["bench"]
    goals = {name: part["tables"].get("goals", []) for name, part in facts.items()}
    assert [row["got"] for row in goals["check"]] == [0, 1]
    assert any("live KD" in row["goal"] for row in goals["step"])
    assert any("Liger" in line for line in facts["step"]["left out"])
    assert sum("build" in row["goal"] for row in goals["build"]) == 2
    assert "waiting" in goals["read"][0]["goal"]
    methods = [row["method"] for row in facts["student"]["tables"]["gap, nats"]]
    assert methods == ["at the start", "excess"]


def test_what_time_does_not_allow_is_named(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--json", str(out), "--minutes", "0"]
    chosen = ["--part", "step", "--part", "student"]
    done = CliRunner().invoke(main, [*words, *chosen], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    step, student = json.loads(out.read_text())
    assert len(step["left out"]) == 2
    assert student["left out"] == ["the teacher: the time was over"]


@pytest.mark.filterwarnings("ignore:Profiler clears events")
def test_a_profile_is_a_table_and_a_trace(tmp_path: Path) -> None:
    job = Job(Record("x", {}, ()), pick_device("cpu"), True, 0.0, tmp_path, tmp_path / "profile")
    job.profiled("one product: 1b", lambda: torch.ones(8, 8) @ torch.ones(8, 8))
    assert "aten::mm" in (tmp_path / "profile/one-product-1b.txt").read_text()
    assert (tmp_path / "profile/one-product-1b.json.gz").stat().st_size


@pytest.mark.parametrize(("got", "met"), [(1.0, True), (2.0, False), (float("nan"), False)])
def test_a_goal_is_met_or_not(got: float, met: bool, tmp_path: Path) -> None:
    job = Job(Record("x", {}, ()), pick_device("cpu"), True, 0.0, tmp_path)
    job.goal("most", got, most=1.5)
    job.goal("least", -got, least=-1.5)
    assert [row["met"] for row in job.goals] == [met, met]
