"""The page in a real browser: it is drawn, the console is silent, and nothing leaves the page.

Whatever a page asks for arrives at a proxy that is a bare socket of ours; two control pages show
that a request and a console message would be seen.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ddk_train.report.page import write_page
from ddk_train.report.run_report import load
from tests.runs import NAMES, Page, write_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    *("--enable-logging=stderr", "--virtual-time-budget=2000"),
]

ITS_OWN = re.compile(r"https?://\S*(google|gvt1)\S*|\S*(google|gvt1)\S*:443")
"""What a browser asks for on its own account, whatever it shows."""

MEASURE = """<script>
const box = e => { const b = e.getBoundingClientRect(); return [b.width, b.height] };
const charts = [...document.querySelectorAll("svg.chart")].map(c => ({
  label: c.getAttribute("aria-label"), size: box(c),
  marks: [...c.querySelectorAll("polyline, .band rect")].map(box)}));
document.title = JSON.stringify({charts,
  hidden: [...document.querySelectorAll(".wide")].map(e => e.scrollWidth - e.clientWidth),
  wide: document.documentElement.scrollWidth});
</script>"""


class Proxy:
    """A socket that writes down what is asked for, and answers nothing."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:  # closed
                return
            with client:
                asked = client.recv(4096).decode("latin-1").split(" ")
                if len(asked) > 1 and not ITS_OWN.fullmatch(asked[1]):
                    self.asked.append(asked[1])


class Browser:
    """A headless browser whose only way out is a proxy."""

    def __init__(self, program: str, home: Path) -> None:
        self.program, self.home, self.proxy = program, home, Proxy()

    def open(self, page: Path, *, width: int = 900) -> tuple[str, list[str]]:
        """Return the document of a page as the browser has it, and its console messages."""
        proxy = [f"--proxy-server={self.proxy.address}", "--proxy-bypass-list=<-loopback>"]
        words = [*QUIET, *proxy, f"--user-data-dir={self.home}", f"--window-size={width},1200"]
        done = subprocess.run(
            [self.program, *words, "--dump-dom", page.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    browser = Browser(found, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.proxy.socket.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    runs = [write_run(folder / f"run-{seed}", seed=seed, shift=seed / 10) for seed in (0, 1)]
    runs.append(write_run(folder / "uniform", weighting="uniform"))
    write_page(load(runs), folder / "report.html")
    return folder / "report.html"


def test_nothing_is_asked_for_and_nothing_is_complained_of(browser: Browser, page: Path) -> None:
    before = len(browser.proxy.asked)
    dom, console = browser.open(page)
    assert "</html>" in dom
    assert console == []
    assert browser.proxy.asked[before:] == []


def test_the_controls_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    control = tmp_path / "control.html"
    control.write_text("<img src='http://example.invalid/x.png'><script>none()</script>")
    _, console = browser.open(control)
    assert any("none is not defined" in line for line in console)
    assert "http://example.invalid/x.png" in browser.proxy.asked


@pytest.mark.parametrize("width", [400, 900, 1600])
def test_every_picture_is_drawn_and_fits(
    browser: Browser, page: Path, tmp_path: Path, width: int
) -> None:
    measured, policy = tmp_path / "measured.html", r'<meta http-equiv="Content-Security-Policy".*?>'
    measured.write_text(re.sub(policy, "", page.read_text()).replace("</body>", MEASURE))
    dom, _ = browser.open(measured, width=width)
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title
    found = json.loads(unescape(title[1]))
    assert len(found["charts"]) == page.read_text().count('<svg class="chart"') == 2 + 3 * 6
    for chart in found["charts"]:
        assert min(chart["size"]) > 100, chart["label"]
        assert chart["marks"], chart["label"]
        assert max(w for w, _ in chart["marks"]) > 30, chart["label"]
    assert found["wide"] <= max(width, 500)  # the narrowest that a headless window gets


@pytest.mark.parametrize("width", [500, 1200])
def test_a_page_of_four_runs_fits(browser: Browser, tmp_path: Path, width: int) -> None:
    long = {"weights": ",".join(f"{name}=0.123456" for name in NAMES), "weighting": "fixed"}
    settings: list[dict[str, Any]] = [{}, {"seed": 1}, long, long | {"seed": 1}]
    runs = [write_run(tmp_path / f"a-run-{n}", **s) for n, s in enumerate(settings)]
    page = tmp_path / "page.html"
    write_page(load(runs), page)
    policy = r'<meta http-equiv="Content-Security-Policy".*?>'
    page.write_text(re.sub(policy, "", page.read_text()).replace("</body>", MEASURE))
    dom, _ = browser.open(page, width=width)
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title
    found = json.loads(unescape(title[1]))
    assert found["wide"] <= width
    if width > 1000:  # a narrow page scrolls its tables
        assert max(found["hidden"]) <= 1


def test_the_table_in_the_browser_is_the_parquet(browser: Browser, page: Path) -> None:
    dom, _ = browser.open(page)
    shown = [row for row in Page(dom).rows if len(row) == 10]
    for run in ("run-0", "run-1", "uniform"):
        history = pq.read_table(page.parent / run / "history.parquet").to_pylist()
        for name in NAMES:
            first, *_, last = (row for row in history if row["domain"] == name)
            ratio = math.exp(last["student_loss"] - last["teacher_loss"])
            wanted = [name, *(
                f"{math.exp(loss):.2f}"
                for loss in (last["teacher_loss"], first["student_loss"], last["student_loss"])
            ), f"{ratio:.2f}", f"{last['kl']:.3f}"]  # fmt: skip
            wanted += [f"{100 * row['weight']:.1f}" for row in (first, last)]
            assert wanted in [row[:6] + row[7:9] for row in shown]  # the seventh is of unseen rows
