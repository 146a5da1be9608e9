"""The run directory: config, metrics, history of gaps and weights, checkpoints.

    config.json            the settings, and which cache and student they met
    metrics.jsonl          a line for each logged step
    history.parquet        a row for each domain of each measurement
    checkpoints/step-N/    what a resumed run needs
    student/               the finished student, an ordinary Hugging Face model

Everything appears whole or not at all. Metrics are appended as they come and cut back to the
checkpoint when a run is resumed, so that no step is ever written twice; the history is small and
replaced as a whole. No torch here: reports are read where none is installed.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddk_cache import DDKError, InputError, MismatchError, atomic
from ddk_train.config import TrainConfig

HISTORY = pa.schema(
    [
        ("step", pa.int64()),
        ("domain", pa.string()),
        ("train_rows", pa.int64()),
        ("rows_seen", pa.int64()),
        ("tokens_seen", pa.int64()),
        ("epoch", pa.float64()),
        ("student_loss", pa.float64()),
        ("teacher_loss", pa.float64()),
        ("student_perplexity", pa.float64()),
        ("teacher_perplexity", pa.float64()),
        ("kl", pa.float64()),
        ("log_factor", pa.float64()),
        ("weight_before", pa.float64()),
        ("weight", pa.float64()),
        ("eval_seconds", pa.float64()),
    ]
)
"""One row for each domain of each measurement, taken after `step` steps.

`train_rows` is what the domain has, `rows_seen` how many were drawn, `tokens_seen` the positions of
them that the loss counted, as `tokens` in the metrics. Losses and KL(teacher ‖ student) are nats a
position on the held-out rows, null where a domain has none. `log_factor` is the logarithm of the
rule's state (r of Eq. 1 and 2); `weight` is the share of the rows drawn from here on, and
`weight_before` that of the rows before, null at first. Losses and `train_rows`, step by step, give
factors and weights again to the last bit (`ddk_train.weights.update`).
"""

RESUMABLE = {
    *("steps", "run", "cache", "device", "keep", "log_every", "checkpoint_every"),
    *("known_rows", "new_rows", "report_to", "patience", "keep_adapter", "forgetting"),
    *("shard_cache", "shard_cache_size"),
}
"""Settings that may differ when a run is resumed; paths may move, the content may not."""


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """Return the content of config.json: `settings` and `provenance`."""
        try:
            value: dict[str, Any] = json.loads((self.path / "config.json").read_text())
            return value
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path} is no run directory: {error}") from error

    @property
    def exists(self) -> bool:
        """Return whether the run was begun."""
        return (self.path / "config.json").exists()

    def open(self, config: TrainConfig, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Create the directory, or check that it holds the same run; return its provenance.

        The rows that a run began with stay its rows, unless `config.new_rows` asks for those of
        now.

        Raises:
            InputError: it holds something else.
            MismatchError: it was begun with other settings, another cache or another student.
        """
        if not self.exists:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise InputError(f"{self.path} exists and is no run directory. Give another path.")
            self.path.mkdir(parents=True, exist_ok=True)
            return self._write_config(config, provenance)
        was = self.config
        differences = [
            f"  {name}: it has {was[part].get(name)}, this call asks for {now}"
            for part, values in (("settings", config.to_json()), ("provenance", provenance))
            for name, now in json.loads(json.dumps(values)).items()
            if was[part].get(name) != now and name not in RESUMABLE
        ]
        if differences:
            raise MismatchError(
                f"{self.path} was begun with other settings:\n"
                + "\n".join(differences)
                + "\nUse another path, or the original values."
            )
        rows = (provenance if config.new_rows else was["provenance"])["known_rows"]
        return self._write_config(config, {**provenance, "known_rows": rows})

    def _write_config(self, config: TrainConfig, provenance: Mapping[str, Any]) -> dict[str, Any]:
        value = {"settings": config.to_json(), "provenance": dict(provenance)}
        atomic.replace(self.path / "config.json", json.dumps(value, indent=1).encode())
        return dict(provenance)

    # --- metrics ---

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged steps in order: step, loss, ce, kl, lr, grad_norm, tokens, seconds,
        tokens_per_second, wait (share of the time spent waiting for data), eval_share (of the
        time so far, what went into measuring gaps; `seconds` is without it).
        """  # noqa: D205
        path = self.path / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        # A line without its end was torn by a kill, or is being written just now.
        return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append a line of metrics."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Return the rows of the history; see `HISTORY`."""
        path = self.path / "history.parquet"
        if not path.exists():
            return []
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows

    def record(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the rows of one measurement to the history."""
        self._write_history([*self.history(), *rows])

    def _write_history(self, rows: Iterable[Mapping[str, Any]]) -> None:
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], HISTORY), out)
        atomic.replace(self.path / "history.parquet", out.getvalue())

    def rewind(self, step: int, measured: int) -> None:
        """Forget what was logged after `step` and measured after `measured`.

        Those are where a checkpoint goes on; −1 forgets everything.
        """
        if metrics := self.metrics():
            kept = [json.dumps(line) + "\n" for line in metrics if line["step"] <= step]
            atomic.replace(self.path / "metrics.jsonl", "".join(kept).encode())
        self._write_history([row for row in self.history() if row["step"] <= measured])

    # --- checkpoints ---

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return the steps and directories of the whole checkpoints, oldest first."""
        found = (self.path / "checkpoints").glob("step-*")
        whole = [path for path in found if path.suffix != atomic.PARTIAL]
        return sorted((int(path.name.removeprefix("step-")), path) for path in whole)

    @contextmanager
    def checkpoint(self, step: int, keep: int, best: int) -> Iterator[Path]:
        """Give a directory to write a checkpoint into; when it is whole, old ones go.

        Those that stay are the `keep` newest and the one of step `best`.
        """
        with atomic.whole(self.path / "checkpoints" / f"step-{step:08d}") as partial:
            yield partial
        for number, path in self.checkpoints()[:-keep]:
            if number != best:
                shutil.rmtree(path)

    @property
    def student(self) -> Path:
        """Return where the finished student is."""
        return self.path / "student"


def open_run(path: str | Path) -> Run:
    """Open an existing run directory for reading.

    Raises:
        InputError: there is none.
        DDKError: it has no measurement yet.
    """
    run = Run(Path(path))
    if "settings" not in run.config:
        raise InputError(f"{path} is no run directory: its config.json has no settings.")
    if not run.history():
        raise DDKError(f"{path} has no measurement yet; it is there after the first evaluation.")
    return run
