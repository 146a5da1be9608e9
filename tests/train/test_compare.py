"""Several runs: differences to the first, and the spread over seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddk_train.report.compare import by_seed, particulars
from ddk_train.report.run_report import load
from ddk_train.report.table import show
from tests.runs import NAMES, Page, page_of, write_run


def test_runs_are_compared_with_the_first(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b", shift=-0.25, alpha=0.9)
    page = Page(page_of(tmp_path, one, two))
    assert page.row("mean of domains") == ["2.500", "2.250", "−0.250"]
    assert page.row("worst gap") == ["0.500", "0.250", "−0.250"]
    assert page.row("books") == ["1.500", "1.250", "−0.250"]
    assert page.row("alpha") == ["0.5", "0.9", ""]
    assert not [row for row in page.rows if row and row[0] in ("gamma", "run")]


def test_paths_are_told_apart_by_their_ends(tmp_path: Path) -> None:
    caches = ["/data/mix/one.zarr", "/data/mix/sub/one.zarr", "/data/mix/two.zarr"]
    runs = load([write_run(tmp_path / str(n)) for n in range(3)])
    for run, cache in zip(runs, caches, strict=True):
        run.settings.update(cache=cache, weighting="ddk" if run is runs[0] else "eq1")
    rows = dict(particulars(runs))
    assert rows["cache"] == ["…/one.zarr", "…/sub/one.zarr", "…/two.zarr"]
    assert rows["weighting"] == ["ddk", "eq1", "eq1"]


def test_seeds_are_taken_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shifts = {0: -0.1, 1: 0.0, 2: 0.4}
    runs = [
        write_run(tmp_path / f"{rule}-{seed}", shift=shift, seed=seed, weighting=rule)
        for rule in ("ddk", "uniform")
        for seed, shift in shifts.items()
    ]
    ends = [2.5 + shift for shift in shifts.values()]
    wanted = f"{np.mean(ends):.3f} ± {np.std(ends, ddof=1):.3f}"
    page = Page(page_of(tmp_path, *runs[:5]))
    (row,) = (row for row in page.rows if row and row[0] == "runs")
    assert row == ["runs", "3", "2"]
    (row,) = (row for row in page.rows if row and row[0] == "code" and "±" in row[1])
    assert row[1:] == [wanted, f"{np.mean(ends[:2]):.3f} ± {np.std(ends[:2], ddof=1):.3f}"]
    assert "weighting uniform" in {cell for row in page.rows for cell in row}
    show(load(runs))
    assert wanted in capsys.readouterr().out
    assert "Over seeds" not in page_of(tmp_path, runs[0], runs[3])


def test_runs_of_one_seed_have_no_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [write_run(tmp_path / name, shift=shift) for name, shift in (("a", 0.0), ("b", 0.2))]
    (group,) = by_seed(load(same))
    assert (group.seeds, group.loss()) == ("same seed", "2.600")
    show(load(same))
    assert "same seed" in (out := capsys.readouterr().out)
    assert "±" not in out
    other = write_run(tmp_path / "c", shift=0.3, seed=1)
    (group,) = by_seed(load([*same, other]))
    assert group.seeds == "2"
    assert group.loss() == f"2.700 ± {np.std([2.6, 2.8], ddof=1):.3f}"  # a seed counts once


def test_mean_is_over_shared_domains(tmp_path: Path) -> None:
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b", (*NAMES, "math"))
    page = Page(page_of(tmp_path, *runs))
    assert page.row("mean of domains") == ["2.500", "2.500", "+0.000"]
    assert page.row("math") == ["–", "4.500", ""]


def test_other_held_out_rows_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b", ("code", "books"))
    assert "not comparable" in page_of(tmp_path, *runs)
    show(load(runs))
    assert "not comparable" in capsys.readouterr().out
    assert "not comparable" not in page_of(tmp_path, runs[0], write_run(tmp_path / "c"))
