"""The page says what the run directory holds, and asks for no other file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ddk_train.report.run_report import load, to_json
from ddk_train.run.directory import Run
from tests.runs import NAMES, Page, drawings, page_of, write_run

HOSTILE = ("<script>alert(1)</script>", "a & b", "\"'><img src=http://x/y>")


def test_page_asks_for_no_other_file(tmp_path: Path) -> None:
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b", weighting="uniform")
    text = page_of(tmp_path, *runs)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "data")
        assert name != "href" or value.startswith("#")
        assert not name.startswith("on")
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in text


def test_page_is_whole_or_absent(tmp_path: Path) -> None:
    page_of(tmp_path, write_run(tmp_path / "a"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "report.html"]


def test_names_are_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>run & co", HOSTILE)
    text = page_of(tmp_path, run, write_run(tmp_path / "plain"))
    page = Page(text)
    assert not {"script", "img", "b"} & set(page.tags)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;run &amp; co" in text
    assert {row[0] for row in page.rows if row} >= set(HOSTILE)
    assert all(drawing.tag == "svg" for drawing in drawings(text))


def test_table_says_what_the_history_holds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    page = Page(page_of(tmp_path, run))
    rows = pq.read_table(run / "history.parquet").to_pylist()
    for name in NAMES:
        first, *_, last = (row for row in rows if row["domain"] == name)
        losses = [last["teacher_loss"], first["student_loss"], last["student_loss"]]
        ratio = last["student_loss"] - last["teacher_loss"]
        unseen = last["unseen_student_loss"] - last["unseen_teacher_loss"]
        wanted = [f"{math.exp(loss):.2f}" for loss in (*losses, ratio)]
        wanted += [f"{last['kl']:.3f}", f"{math.exp(unseen):.2f}"]
        wanted += [f"{100 * row['weight']:.1f}" for row in (first, last)]
        assert page.row(name)[:-1] == wanted
    assert page.row("code")[-1] == "3.84 k"


def test_all_figures_are_drawn(tmp_path: Path) -> None:
    drawn = drawings(page_of(tmp_path, write_run(tmp_path / "a")))
    assert [drawing.get("aria-label") for drawing in drawn] == [
        "Gap by domain over steps",
        "KL to the teacher by domain over steps",
        "Weights of domains over steps",
        "Training loss over steps",
        "Tokens per second over steps",
        "Share of time waiting for data",
    ]
    ends = ["".join(text.itertext()) for text in drawn[0].findall(".//svg[@class='ends']/text")]
    assert len(ends) == len(NAMES)


def test_one_measurement_is_enough(tmp_path: Path) -> None:
    text = page_of(tmp_path, write_run(tmp_path / "a", measurements=1))
    assert len(drawings(text)) == 3  # nothing was logged yet
    assert not re.search(r'="[^"]*nan', text)


@pytest.mark.parametrize("unmeasured", [("code",), NAMES])
def test_unmeasured_domains_are_dashes(tmp_path: Path, unmeasured: tuple[str, ...]) -> None:
    run = write_run(tmp_path / "a", unmeasured=unmeasured, weighting="uniform")
    text = page_of(tmp_path, run, write_run(tmp_path / "b"))
    assert ["–"] * 5 in [row[1:6] for row in Page(text).rows if row and row[0] == "code"]
    assert not re.search(r'="[^"]*nan', text)
    json.dumps(to_json(load([run])), allow_nan=False)


def test_missing_and_odd_metrics_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", metrics=False)
    Run(run).log({"step": 310, "loss": math.nan, "ce": math.inf, "kl": None, "wait": 0.5})
    labels = [one.get("aria-label") for one in drawings(page_of(tmp_path, run))]
    assert labels[3:] == [
        "Training loss over steps",
        "Share of time waiting for data",
    ]
    assert load([run])[0].tokens_per_second is None
    assert load([run])[0].steps == 310
