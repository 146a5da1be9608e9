"""Reports: what the tables and the page say is what the run directory holds, and nothing leaks.

The runs are written by `Run` itself; their values are made up.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest

from ddk_cache import DDKError, InputError
from ddk_train.config import TrainConfig
from ddk_train.report import charts as plot
from ddk_train.report.compare import particulars
from ddk_train.report.page import write_page
from ddk_train.report.run_report import load, to_json
from ddk_train.report.table import show
from ddk_train.run import Run

NAMES = ("books", "code", "web")
HOSTILE = ("<script>alert(1)</script>", "a & b", "\"'><img src=http://x/y>")


def write_run(
    path: Path,
    names: Sequence[str] = NAMES,
    measurements: int = 4,
    shift: float = 0.0,
    unmeasured: Sequence[str] = (),
    metrics: bool = True,
    **settings: Any,
) -> Path:
    """Write a run of 100 steps an interval; domain n has a teacher's loss of n + 1 nats."""
    run = Run(path)
    config = TrainConfig(cache="mix.zarr", run=str(path), student="config.json", **settings)
    run.open(config, {"cache_fingerprint": "f00d", "cache_content": dict.fromkeys(names, "beef")})
    for k in range(measurements):
        weights = np.arange(1, len(names) + 1) ** (k / 2)
        weights /= weights.sum()
        run.record(
            {
                "step": 100 * k,
                "domain": name,
                "rows_seen": 10 * k * (n + 1),
                "tokens_seen": 640 * k * (n + 1),
                "epoch": k / 8,
                "student_loss": None if name in unmeasured else n + 1 + shift + 2 / (k + 1),
                "teacher_loss": None if name in unmeasured else n + 1.0,
                "kl": None if name in unmeasured else 1 / (k + 1),
                "log_factor": -math.log(len(names)),
                "weight": weights[n],
                "eval_seconds": 0.5,
            }
            for n, name in enumerate(names)
        )
    for step in range(10, 100 * (measurements - 1) + 1, 10):
        line = {"step": step, "loss": 3.0 + 10 / step, "ce": 2.5 + 10 / step, "kl": 0.5}
        more = {"tokens": 64 * step, "seconds": step / 2, "tokens_per_second": 128.0, "wait": 0.01}
        run.log(line | more if metrics else line)
    return path


class Page(HTMLParser):
    """The tags, attributes and table rows of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data.strip()

    def row(self, head: str) -> list[str]:
        return next(row[1:] for row in self.rows if row and row[0] == head)


def page_of(tmp_path: Path, *runs: Path) -> str:
    write_page(load(runs), tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def drawings(page: str) -> list[ElementTree.Element]:
    found = re.findall(r'<svg class="chart".*?</svg>\n</svg>', page, re.DOTALL)
    return [ElementTree.fromstring(drawing) for drawing in found]


# --- the page ---


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
        wanted = [f"{math.exp(loss):.2f}" for loss in (*losses, ratio)]
        wanted += [f"{last['kl']:.3f}"]
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
        "Tokens a second over steps",
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


# --- several runs ---


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


def test_mean_is_over_shared_domains(tmp_path: Path) -> None:
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b", (*NAMES, "math"))
    page = Page(page_of(tmp_path, *runs))
    assert page.row("mean of domains") == ["2.500", "2.500", "+0.000"]
    assert page.row("math") == ["–", "4.500", ""]


def test_other_held_out_rows_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b", ("code", "books"))
    assert "on different scales" in page_of(tmp_path, *runs)
    show(load(runs))
    assert "differ" in capsys.readouterr().out
    assert "on different scales" not in page_of(tmp_path, runs[0], write_run(tmp_path / "c"))


def test_equal_directory_names_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / part / "final") for part in ("x", "y")]
    assert [report.name for report in load([*runs, runs[0]])] == ["x/final", "y/final"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        load([tmp_path])
    with pytest.raises(DDKError, match="no measurement yet"):
        load([write_run(tmp_path / "a", measurements=0)])


# --- terminal and JSON ---


def test_terminal_has_every_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("[red]books[/]", "code", "a name of a domain that is longer than most columns are")
    show(load([write_run(tmp_path / "a", names), write_run(tmp_path / "[b]", names)]))
    out = capsys.readouterr().out
    assert all(out.count(name) >= 3 for name in names)
    assert "\n[b]\n" in out
    assert f"{math.exp(1.5):.2f}" in out
    assert "300 steps, 128 tokens/s, mean held-out loss 2.500" in out


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


# --- drawing ---


def test_ticks_are_round_and_hold_the_values() -> None:
    assert plot.linear(0, 41_300, 5).labels == ["0", "10k", "20k", "30k", "40k", "50k"]
    assert plot.linear(2.61, 2.84, 5).labels == ["2.60", "2.65", "2.70", "2.75", "2.80", "2.85"]
    assert plot.logarithmic(1, 14).labels == ["1", "2", "5", "10", "20"]
    assert plot.logarithmic(1, 45_000).labels == ["1", "10", "100", "1,000", "10,000"]
    assert plot.steps_axis(2_750).labels == ["0", "1,000", "2,000"]
    assert plot.steps_axis(0).labels == ["0", "1"]


@pytest.mark.parametrize("seed", range(20))
def test_axes_hold_any_values(seed: int) -> None:
    random = np.random.default_rng(seed)
    low = 10 ** random.uniform(-8, 8)
    for high in (low, low * (1 + 10 ** random.uniform(-6, 0)), low * 10 ** random.uniform(0, 30)):
        for axis in (plot.linear(low, high, 5), plot.logarithmic(low, high)):
            assert axis.low <= low * (1 + 1e-9)
            assert axis.high >= high * (1 - 1e-9)
            assert 2 <= len(axis.ticks) <= 10
            assert axis([axis.low, axis.high]).tolist() == [0, 1]


def test_smooth_is_a_running_mean() -> None:
    y = np.random.default_rng(0).normal(size=50)
    for window in (0, 1, 8, 200):
        half = window // 2
        slow = [y[i - min(half, i) : i + min(half, i) + 1].mean() for i in range(len(y))]
        np.testing.assert_allclose(plot.smooth(y, window), slow, atol=1e-12)


def test_a_long_line_keeps_its_peaks() -> None:
    x, y = np.arange(100_000.0), np.ones(100_000)
    y[77_777] = 3.0
    drawn = plot.lines([plot.Series("a", x, y)], end=1e5, title="t", unit="u", base=0)
    (line,) = ElementTree.fromstring(drawn).findall(".//polyline")
    points = line.get("points", "").split()
    assert len(points) <= 2 * plot.BUCKETS + 2
    assert "777.8,0.0" in points


def test_weights_are_steps() -> None:
    shares = np.array([[0.25, 0.5, 0.1], [0.75, 0.5, 0.9]])
    drawn = plot.stacked(["a", "b"], [0, 100, 200], shares, end=200, title="t", unit="u")
    titles = [one.text for one in ElementTree.fromstring(drawn).findall(".//rect/title")]
    assert titles == [
        "a, steps 0–100: 25.0%",
        "a, steps 100–200: 50.0%",
        "b, steps 0–100: 75.0%",
        "b, steps 100–200: 50.0%",
    ]  # what was set at step 200 has drawn nothing yet


def test_labels_do_not_overlap() -> None:
    series = [
        plot.Series(f"{n}", np.array([0.0, 1]), np.array([0, 1 + n / 1000])) for n in range(30)
    ]
    drawn = ElementTree.fromstring(plot.lines(series, end=1, title="t", unit="u"))
    height = float(drawn.get("height", ""))
    places = [float(text.get("y", "")) for text in drawn.findall(".//svg[@class='ends']/text")]
    assert len(places) == 30
    assert np.diff(places).min() >= plot.LABEL - 0.1
    assert 0 <= min(places) < max(places) <= height
