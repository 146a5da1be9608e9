"""The run directory: config, metrics, history of gaps and weights, checkpoints.

    config.json            the settings, and which cache and student they were used with
    metrics.jsonl          one line per logged step
    history.parquet        one row per domain and measurement
    checkpoints/step-N/    what a resumed run needs
    student/               the finished student, an ordinary Hugging Face model
    lock                   the process that trains here, while it does

Everything but the metrics appears whole or not at all. Metrics are appended as they come and cut
back to the checkpoint when a run is resumed, so that no step is written twice; the history is small
and replaced as a whole. No torch here: reports are read where none is installed.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddk_cache import DDKError, InputError, MismatchError, atomic
from ddk_train.run.lock import locked

if TYPE_CHECKING:
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
        ("fall_error", pa.float64()),
        ("unseen_student_loss", pa.float64()),
        ("unseen_teacher_loss", pa.float64()),
        ("student_perplexity", pa.float64()),
        ("teacher_perplexity", pa.float64()),
        ("kl", pa.float64()),
        ("log_factor", pa.float64()),
        ("weight_before", pa.float64()),
        ("weight", pa.float64()),
        ("decaying", pa.bool_()),
        ("eval_seconds", pa.float64()),
        ("pair_loss", pa.float64()),
        ("margin", pa.float64()),
        ("preferred", pa.float64()),
        ("reward_teacher", pa.float64()),
        ("reward_student", pa.float64()),
    ]
)
"""One row per domain and measurement, taken after `step` steps.

`train_rows` counts the rows of the domain, `rows_seen` those drawn so far, `tokens_seen` their
positions that the loss counted, as `tokens` does in the metrics. Losses and KL(teacher ‖ student)
are nats per position on the held-out rows, null where a domain has none; `fall_error` is the
standard error of the fall of the student's loss over the last `window` measurements. The `unseen`
losses are those of training rows drawn for the first time, at the step that drew them, since the
measurement before, or else of the latest interval that had any. `decaying` says that the rate was
in the decay of schedule wsd. `log_factor` is the logarithm of the rule's state (r of Eq. 1 and 2),
null for a domain that is not trained on; `weight` is the share of rows drawn after the measurement,
and `weight_before` the share before it, null at first. Losses, `fall_error`, `decaying`, counts of
rows and `epoch`, step by step, reproduce factors and weights bit for bit
(`ddk_train.weights.rules.update`); a domain without held-out rows takes its unseen losses
(`Gaps.filled`).

The last five columns are means over held-out pairs of responses (`ddk_train.pairs.SUMS`), null in a
run without pairs.
"""

MAY_CHANGE = {
    *("steps", "run", "cache", "student", "device", "keep", "log_every", "checkpoint_every"),
    *("known_rows", "new_rows", "report_to", "patience", "keep_adapter", "forgetting"),
    *("shard_cache", "shard_cache_size", "trust_remote_code"),
}
"""Settings that may differ when a run is resumed. Paths may move; the content of cache and student
is compared by the hashes in the provenance. `steps` has its own check: see `ddk_train.job`."""

LOCK = "lock"


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """Return the content of config.json: `settings` and `provenance`.

        Raises:
            InputError: it is missing or damaged.
        """
        path = self.path / "config.json"
        try:
            value = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{self.path} is not a run directory: {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get("settings"), dict):
            raise InputError(f"{self.path} is not a run directory: {path} has no settings.")
        return value

    @property
    def started(self) -> bool:
        """Return whether the run has something to resume or to lose."""
        finished = self.student.exists() or bool(self.checkpoints())
        return (self.path / "config.json").exists() and finished

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other trainers out during a with block; an unused new directory is removed again.

        Raises:
            InputError: the path holds something other than a run, or another process trains there.
        """
        self._check_place()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.path / LOCK):
                self._clean_up()
                yield
        finally:
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def _check_place(self) -> None:
        if (self.path / "config.json").exists():
            _ = self.config  # raises where it is that of something else, of a model for example
        elif self.path.exists() and not (
            self.path.is_dir()
            and all(p.name == LOCK or p.suffix == atomic.PARTIAL for p in self.path.iterdir())
        ):
            raise InputError(f"{self.path} exists and is not a run directory. Give another path.")

    def _clean_up(self) -> None:
        """Remove what a killed process was writing; under the lock, none of it has an owner."""
        for partial in (*self.path.glob("checkpoints/step-*"), *self.path.glob("student*")):
            if partial.suffix == atomic.PARTIAL:
                shutil.rmtree(partial)
        for name in ("config.json", "metrics.jsonl", "history.parquet"):
            for file in self.path.glob(f"{name}~*{atomic.PARTIAL}"):
                file.unlink()

    def compare(self, config: TrainConfig, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Return the provenance to train with, after checking that it is the same run.

        A run keeps the rows it started with, unless `config.new_rows` asks for the present ones. A
        run that left neither a checkpoint nor a student takes any settings.

        Raises:
            MismatchError: it was started with other settings, another cache or another student.
        """
        if not self.started:
            return dict(provenance)
        was = {"provenance": {}} | self.config
        differences = [
            f"  {name}: it has {was[part].get(name)}, this call asks for {now}"
            for part, values in (("settings", config.to_json()), ("provenance", provenance))
            for name, now in json.loads(json.dumps(values)).items()
            if was[part].get(name) != now and name not in MAY_CHANGE
        ]
        if differences:
            raise MismatchError(
                f"{self.path} was started with other settings:\n"
                + "\n".join(differences)
                + "\nUse another run directory, or the original values "
                f"(--config {self.path / 'config.json'})."
            )
        known = provenance if config.new_rows else was["provenance"]
        return {**provenance, "known_rows": known.get("known_rows")}

    def open(self, config: TrainConfig, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Write config.json and return the provenance to train with; see `compare`."""
        found = self.compare(config, provenance)
        self.path.mkdir(parents=True, exist_ok=True)
        value = {"settings": config.to_json(), "provenance": found}
        atomic.replace(self.path / "config.json", json.dumps(value, indent=1).encode())
        return found

    # --- metrics ---

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged steps in order: step, loss, ce, kl, lr, grad_norm, tokens, seconds
        (without measurements), tokens_per_second, wait (share of the time spent waiting for data),
        eval_share (share of the time so far that measurements took).

        Raises:
            DDKError: the file is damaged.
        """  # noqa: D205
        path = self.path / "metrics.jsonl"
        text = path.read_text(errors="replace") if path.exists() else ""
        # A last line without its end was cut off by a kill, or is being written at this moment.
        whole = [line for line in text.splitlines(True) if line.endswith("\n")]
        try:
            found = [json.loads(line) for line in whole]
            for line in found:
                int(line["step"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise damaged(path, error) from error
        return found

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append a line of metrics."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Return the rows of the history; see `HISTORY`.

        Raises:
            DDKError: the file is damaged.
        """
        path = self.path / "history.parquet"
        if not path.exists():
            return []
        try:
            with path.open("rb") as file:  # pyarrow would take a path like run:1 for a URL
                # Not read_table: its threads may abort a command that ends while they start.
                table = pq.ParquetFile(file).read(use_threads=False)
            missing = {"step", "domain"} - set(table.column_names)
            if missing:
                raise ValueError(f"it has no column {', '.join(sorted(missing))}")
            rows: list[dict[str, Any]] = table.to_pylist()
        except (pa.ArrowException, ValueError) as error:
            raise damaged(path, error) from error
        return rows

    def record(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the rows of one measurement to the history."""
        self._write_history([*self.history(), *rows])

    def _write_history(self, rows: Iterable[Mapping[str, Any]]) -> None:
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], HISTORY), out)
        atomic.replace(self.path / "history.parquet", out.getvalue())

    def rewind(self, step: int, measured: int) -> None:
        """Remove what was logged after `step` and measured after `measured`; −1 removes all."""
        if metrics := self.metrics():
            kept = [json.dumps(line) + "\n" for line in metrics if line["step"] <= step]
            atomic.replace(self.path / "metrics.jsonl", "".join(kept).encode())
        self._write_history([row for row in self.history() if row["step"] <= measured])

    # --- checkpoints ---

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return the steps and directories of the whole checkpoints, oldest first."""
        found = (self.path / "checkpoints").glob("step-*")
        return sorted(
            (int(path.name.removeprefix("step-")), path)
            for path in found
            if re.fullmatch(r"step-[0-9]+", path.name)
        )

    @contextmanager
    def checkpoint(self, step: int, keep: int, best: int) -> Iterator[Path]:
        """Give a directory to write a checkpoint into; once it is whole, older ones are removed.

        Those that stay are the `keep` newest and the one of step `best`.
        """
        with atomic.whole(self.path / "checkpoints" / f"step-{step:08d}") as partial:
            yield partial
        for number, path in self.checkpoints()[:-keep]:
            if number != best:
                shutil.rmtree(path)

    def set_aside(self, checkpoint: Path) -> Path:
        """Rename a damaged checkpoint, so that it no longer counts as one; return its new path."""
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        return checkpoint.rename(aside)

    @property
    def student(self) -> Path:
        """Return the directory of the finished student."""
        return self.path / "student"


def damaged(path: Path, error: Exception) -> DDKError:
    """Return the error of a damaged log, and how to go on without it."""
    return DDKError(
        f"{path} is damaged: {error}. Restore it, or delete it to resume without its records."
    )


def open_run(path: str | Path) -> Run:
    """Open an existing run directory for reading.

    Raises:
        InputError: there is none.
        DDKError: it has no measurement yet, or its history is damaged.
    """
    run = Run(Path(path).expanduser())
    _ = run.config  # raises where it is not a run directory
    if not run.history():
        raise DDKError(f"{path} has no measurement yet. Try again after the first evaluation.")
    return run
