"""Charts: round ticks that hold the values, peaks kept, labels that do not overlap."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from ddk_train.report import charts


def test_ticks_are_round_and_hold_the_values() -> None:
    assert charts.linear(0, 41_300, 5).labels == ["0", "10k", "20k", "30k", "40k", "50k"]
    assert charts.linear(2.61, 2.84, 5).labels == ["2.60", "2.65", "2.70", "2.75", "2.80", "2.85"]
    assert charts.logarithmic(1, 14).labels == ["1", "2", "5", "10", "20"]
    assert charts.logarithmic(1, 45_000).labels == ["1", "10", "100", "1,000", "10,000"]
    assert charts.steps_axis(2_750).labels == ["0", "1,000", "2,000"]
    assert charts.steps_axis(0).labels == ["0", "1"]


@pytest.mark.parametrize("seed", range(20))
def test_axes_hold_any_values(seed: int) -> None:
    random = np.random.default_rng(seed)
    low = 10 ** random.uniform(-8, 8)
    for high in (low, low * (1 + 10 ** random.uniform(-6, 0)), low * 10 ** random.uniform(0, 30)):
        for axis in (charts.linear(low, high, 5), charts.logarithmic(low, high)):
            assert axis.low <= low * (1 + 1e-9)
            assert axis.high >= high * (1 - 1e-9)
            assert 2 <= len(axis.ticks) <= 10
            assert axis([axis.low, axis.high]).tolist() == [0, 1]


def test_smooth_is_a_running_mean() -> None:
    y = np.random.default_rng(0).normal(size=50)
    for window in (0, 1, 8, 200):
        half = window // 2
        slow = [y[i - min(half, i) : i + min(half, i) + 1].mean() for i in range(len(y))]
        np.testing.assert_allclose(charts.smooth(y, window), slow, atol=1e-12)


def test_a_long_line_keeps_its_peaks() -> None:
    x, y = np.arange(100_000.0), np.ones(100_000)
    y[77_777] = 3.0
    drawn = charts.lines([charts.Series("a", x, y)], end=1e5, title="t", unit="u", base=0)
    (line,) = ElementTree.fromstring(drawn).findall(".//polyline")
    points = line.get("points", "").split()
    assert len(points) <= 2 * charts.BUCKETS + 2
    assert "777.8,0.0" in points


def test_weights_are_steps() -> None:
    shares = np.array([[0.25, 0.5, 0.1], [0.75, 0.5, 0.9]])
    drawn = charts.stacked(["a", "b"], [0, 100, 200], shares, end=200, title="t", unit="u")
    titles = [one.text for one in ElementTree.fromstring(drawn).findall(".//rect/title")]
    assert titles == [
        "a, steps 0–100: 25.0%",
        "a, steps 100–200: 50.0%",
        "b, steps 0–100: 75.0%",
        "b, steps 100–200: 50.0%",
    ]  # what was set at step 200 has drawn nothing yet


def test_labels_do_not_overlap() -> None:
    series = [
        charts.Series(f"{n}", np.array([0.0, 1]), np.array([0, 1 + n / 1000])) for n in range(30)
    ]
    drawn = ElementTree.fromstring(charts.lines(series, end=1, title="t", unit="u"))
    height = float(drawn.get("height", ""))
    places = [float(text.get("y", "")) for text in drawn.findall(".//svg[@class='ends']/text")]
    assert len(places) == 30
    assert np.diff(places).min() >= charts.LABEL - 0.1
    assert 0 <= min(places) < max(places) <= height
