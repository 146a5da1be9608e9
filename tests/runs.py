"""Run directories with made-up values, written by `Run` itself; pages read back; trainers."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ddk_train.config import TrainConfig
from ddk_train.distributed import Processes
from ddk_train.job import assemble
from ddk_train.report.page import write_page
from ddk_train.report.run_report import load
from ddk_train.run.directory import Run
from ddk_train.trainer import Trainer

NAMES = ("books", "code", "web")


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
                "unseen_student_loss": n + 1 + shift + 3 / (k + 1) if k else None,
                "unseen_teacher_loss": n + 1.0 if k else None,
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


def open_trainer(config: TrainConfig) -> Trainer:
    """Return the trainer of a run, before its first step."""
    return assemble(config, Processes(config), Run(Path(config.run)))


def copy_up_to(checkpoint: Path, run: Run, path: Path) -> None:
    """Copy a run as if it had ended at a checkpoint, but for what it logged later."""
    (path / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "history.parquet", "metrics.jsonl"):
        shutil.copy(run.path / name, path / name)
    shutil.copytree(checkpoint, path / "checkpoints" / checkpoint.name)


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
