"""Charts as inline SVG, for a page that opens from disk: no script, no plotting library.

A chart fills its container while its text keeps its size: x is in percent, y in pixels, and only
paths are stretched. One drawing therefore serves a phone and a wide screen; the price is that
nothing can be placed by the width of a text. Colors, fonts and margins are CSS of the page that
contains the chart (classes `chart`, `grid`, `base`, `c0` … `c9`, …), so light and dark mode, screen
and paper share one drawing. Native tooltips show the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from ddk_train.report.numbers import SCALES

Floats = npt.NDArray[np.float64]

COLORS = 10
"""Colors of the page. Further series reuse them, dashed or paler."""

HEIGHT = 280
"""Pixels from the lowest to the highest value."""

LABEL = 15
"""Height of a line of labels in pixels."""

BUCKETS = 500
"""A longer series is cut into this many parts, and the extremes of each part are kept."""

TOOLTIPS = 60
"""Points per series that have a tooltip; they are drawn as dots if there are no more points."""


@dataclass(frozen=True)
class Series:
    """A line: values over steps."""

    name: str
    x: Floats
    """(N) steps, rising."""
    y: Floats
    """(N) values. Values that are not finite are left out."""
    color: int = 0
    faint: bool = False
    """Draw it behind the others, without label and tooltips: raw values of a smoothed series."""


@dataclass(frozen=True)
class Axis:
    """A range of values with its ticks and their labels."""

    low: float
    high: float
    ticks: list[float]
    labels: list[str]
    log: bool = False

    def __call__(self, values: npt.ArrayLike) -> Floats:
        """Return the positions of values along the axis, 0 … 1."""
        low, high, at = (np.asarray(v, np.float64) for v in (self.low, self.high, values))
        if self.log:
            low, high, at = np.log10(low), np.log10(high), np.log10(at)
        return np.asarray((at - low) / (high - low))


def linear(low: float, high: float, ticks: int) -> Axis:
    """Return an axis with about `ticks` round ticks, the first and the last at its ends."""
    high = high if high > low else low + max(abs(low) * 0.1, 1e-3)
    rough = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if rough <= m * power * (1 + 1e-9))
    marks = np.arange(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1) * step
    scale, suffix = next((s for s in SCALES if abs(marks).max() >= 10 * s[0]), (1.0, ""))
    decimals = max(0, -math.floor(math.log10(step / scale) + 1e-9))
    labels = [f"{mark / scale:,.{decimals}f}{suffix if mark else ''}" for mark in marks]
    return Axis(float(marks[0]), float(marks[-1]), marks.tolist(), labels)


def logarithmic(low: float, high: float) -> Axis:
    """Return an axis of powers of ten, with 2 and 5 between them where they fit."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [m * 10.0**e for e in exponents for m in (1, 2, 5)]
    first = max(i for i, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
    last = min(i for i, mark in enumerate(marks) if mark >= high * (1 - 1e-9))
    marks = marks[first : max(last, first + 1) + 1]
    tens = [10.0**e for e in exponents if marks[0] <= 10.0**e <= marks[-1]]
    ticks = marks if len(marks) <= 8 else tens[:: math.ceil(len(tens) / 8)]
    return Axis(marks[0], marks[-1], ticks, [f"{tick:,.10g}" for tick in ticks], log=True)


def steps_axis(end: float) -> Axis:
    """Return the horizontal axis, from step 0 to the last step, which need not be round."""
    end = max(end, 1)
    rounded = linear(0, max(end, 5), 5)
    count = sum(tick <= end for tick in rounded.ticks)
    return Axis(0, end, rounded.ticks[:count], rounded.labels[:count])


def smooth(y: Floats, window: int) -> Floats:
    """Return a centered running mean over about `window` values; (N) → (N), all finite.

    The window is narrower near the start, where a loss falls fast, and is cut off at the end.
    """
    at = np.arange(len(y))
    reach = np.minimum(window // 2, at)
    low, high = at - reach, np.minimum(at + reach + 1, len(y))
    sums = np.concatenate([[0.0], np.cumsum(y)])
    return np.asarray((sums[high] - sums[low]) / (high - low), np.float64)


def lines(
    series: Sequence[Series],
    *,
    end: float,
    title: str,
    unit: str,
    base: float | None = None,
    log: bool | None = None,
) -> str:
    """Return a line chart over steps 0 … `end`; an empty string if no value can be drawn.

    `title` is for screen readers, `unit` is printed above the axis. `base` is a reference value
    that the axis must include, drawn as a heavier rule, for example zero or the teacher. `log`
    requests a logarithmic axis; None chooses one for positive values that span more than a decade.
    """
    behind_first = sorted(series, key=lambda one: not one.faint)
    drawn = [one for one in map(_drawable, behind_first) if len(one.x)]
    if not drawn:
        return ""
    low, high = (f([*(f(one.y) for one in drawn), *_given(base)]) for f in (np.min, np.max))
    log = low > 0 and (high > 10 * low if log is None else log)
    y_axis = logarithmic(low, high) if log else linear(low, high, 5)
    x_axis = steps_axis(end)
    named = [one for one in drawn if not one.faint]
    height = max(HEIGHT, LABEL * len(named))
    rules = [_rule("base", y) for y in (1 - y_axis(_given(base))) * height]
    paths = [_path(one, x_axis, y_axis, height) for one in drawn]
    points = [_points(one, x_axis, y_axis, height) for one in named]
    ends = [(one.name, one.color, height * (1 - y_axis(one.y)[-1])) for one in named]
    stretched = f'<svg viewBox="0 0 1000 {height}" preserveAspectRatio="none">'
    body = [*rules, stretched, *paths, "</svg>", *points, _ends(ends, height)]
    unit += " (log scale)" if log else ""
    return _chart(body, x_axis, y_axis, height, title, unit)


def stacked(
    names: Sequence[str],
    steps: Sequence[float],
    shares: Floats,
    *,
    end: float,
    title: str,
    unit: str,
) -> str:
    """Return shares stacked over steps.

    Shares (D, M) apply from the corresponding entry of `steps` (M) up to the next one, the last up
    to `end`. They are drawn as steps because they are constant between two measurements.
    """
    x_axis, y_axis = steps_axis(end), linear(0, 100, 5)
    height = max(HEIGHT, LABEL * len(names))
    edges = np.append(steps, max(end, steps[-1]))
    if edges[-1] > edges[0]:  # shares set at the last step have not drawn a row yet
        shares, edges = shares[:, edges[:-1] < edges[-1]], np.unique(edges)
    else:
        edges[-1] = x_axis.high
    tops = height * (1 - np.cumsum(shares, axis=0))
    sizes = height * shares
    body, ends = [], []
    for domain, name in enumerate(names):
        body.append(f'<g class="band {_hue(domain)}">')
        for k, share in enumerate(shares[domain]):
            left, right = x_axis([edges[k], edges[k + 1]]) * 100
            width = right - left + 0.05  # closes seams that rounding leaves
            size = max(sizes[domain, k] - 1, 0.5)  # a gap of one pixel between two domains
            note = f"{name}, steps {edges[k]:,.0f}–{edges[k + 1]:,.0f}: {share:.1%}"
            body.append(
                f'<rect x="{left:.2f}%" y="{tops[domain, k]:.1f}" width="{width:.2f}%" '
                f'height="{size:.1f}"><title>{escape(note)}</title></rect>'
            )
        body.append("</g>")
        ends.append((name, domain, tops[domain, -1] + sizes[domain, -1] / 2))
    return _chart([*body, _ends(ends, height)], x_axis, y_axis, height, title, unit)


# --- parts of a chart ---


def _chart(
    body: Sequence[str], x_axis: Axis, y_axis: Axis, height: int, title: str, unit: str
) -> str:
    """Return a body between its axes; the page sets the margins that contain the labels."""
    out = [f'<svg class="chart" role="img" aria-label="{escape(title)}" height="{height}">']
    out.append(f'<text class="unit" x="0" y="-12">{escape(unit)}</text>')
    for at, label in zip(y_axis(y_axis.ticks), y_axis.labels, strict=True):
        y = height * (1 - at)
        out.append(_rule("grid", y))
        out.append(f'<text class="y" x="-10" y="{y:.1f}" dy=".35em">{label}</text>')
    for at, label in zip(x_axis(x_axis.ticks), x_axis.labels, strict=True):
        out.append(f'<text class="x" x="{at * 100:.2f}%" y="{height + 20}">{label}</text>')
    out.append(f'<text class="y" x="-10" y="{height + 20}">step</text>')
    return "\n".join([*out, *body, "</svg>"])


def _rule(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'


def _given(base: float | None) -> list[float]:
    return [] if base is None else [base]


def _hue(color: int) -> str:
    return f"c{color % COLORS}" + (" again" if color >= COLORS else "")


def _drawable(one: Series) -> Series:
    """Drop values that are not finite, then thin a long series but keep its peaks."""
    good = np.isfinite(one.y)
    x, y = one.x[good], one.y[good]
    if len(y) > 2 * BUCKETS:
        cuts = np.linspace(0, len(y), BUCKETS + 1).astype(int)[:-1]
        pairs = zip(cuts, np.append(cuts[1:], len(y)), strict=True)
        peaks = {a + int(f(y[a:b])) for a, b in pairs for f in (np.argmin, np.argmax)}
        kept = sorted(peaks | {0, len(y) - 1})
        x, y = x[kept], y[kept]
    return Series(one.name, x, y, one.color, one.faint)


def _path(one: Series, x_axis: Axis, y_axis: Axis, height: int) -> str:
    xs, ys = x_axis(one.x) * 1000, (1 - y_axis(one.y)) * height
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    kind = f"line {_hue(one.color)}" + (" faint" if one.faint else "")
    return f'<polyline class="{kind}" points="{places}"/>'


def _points(one: Series, x_axis: Axis, y_axis: Axis, height: int) -> str:
    """Return the points with tooltips: visible dots if the series is short, else invisible."""
    every = math.ceil(len(one.x) / TOOLTIPS)
    out = [f'<g class="{"points" if every == 1 else "hover"} {_hue(one.color)}">']
    for x, y in zip(one.x[::every], one.y[::every], strict=True):
        value = f"{y:,.0f}" if abs(y) >= 1000 else f"{y:.4g}"
        out.append(
            f'<circle cx="{x_axis([x])[0]:.2%}" cy="{height * (1 - y_axis([y])[0]):.1f}" r="3">'
            f"<title>{escape(one.name)}, step {x:,.0f}: {value}</title></circle>"
        )
    return "".join([*out, "</g>"])


def _ends(ends: Sequence[tuple[str, int, float]], height: int) -> str:
    """Return labels at the right ends of (name, color, y), moved apart so that none overlap."""
    ends = sorted(ends, key=lambda end: end[2])
    places = [end[2] for end in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LABEL)
    ceiling = float(height)
    for i in reversed(range(len(places))):
        places[i] = ceiling = min(places[i], ceiling)
        ceiling -= LABEL
    out = ['<svg class="ends" x="100%">']
    for (name, color, y), place in zip(ends, places, strict=True):
        short = name if len(name) <= 17 else name[:16] + "…"
        out.append(
            f'<path class="{_hue(color)}" d="M5,{y:.1f} L16,{place:.1f} h6"/>'
            f'<text x="27" y="{place:.1f}" dy=".35em">{escape(short)}'
            f"<title>{escape(name)}</title></text>"
        )
    return "".join([*out, "</svg>"])
