"""What the two command lines share: errors as messages, log records and progress on stderr.

The library logs and never prints; the commands attach a handler that writes the records of one
rank to stderr. Data go to stdout. A terminal gets a progress bar; a log file gets a line every few
seconds, because a bar that is redrawn into a file is unreadable.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

import click

from ddk_cache.errors import DDKError, unknown

LINE_SECONDS = 10.0
"""Seconds between progress lines where stderr is not a terminal."""

LOGGERS = ("ddk_cache", "ddk_train")

log = logging.getLogger(__name__)


def say(message: str) -> None:
    """Print a message on stderr."""
    click.echo(message, err=True)


class Handler(logging.Handler):
    """Log records as plain lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of a record."""
        say(record.getMessage())


def show_logs() -> None:
    """Write the library's log records to stderr: those of rank 0, and warnings of every rank."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        if not any(isinstance(handler, Handler) for handler in logger.handlers):
            logger.addHandler(Handler())
        logger.propagate = False


class Commands(click.Group):
    """A group whose commands end in one clear message, never in a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a DDKError or Ctrl-C becomes its message and exit code."""
        signal.signal(signal.SIGTERM, _interrupt)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # an ASCII terminal gets "?" for "→"
                stream.reconfigure(errors="replace")
        show_logs()
        try:
            return super().invoke(ctx)
        except DDKError as error:
            say(f"Error: {error}")
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            say("Stopped. Finished work is kept; run the same command again to resume.")
            ctx.exit(1)
        except BrokenPipeError:  # the reader of stdout, `head` for example, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except OSError as error:
            say(f"Error: {error}")
            ctx.exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM, by which schedulers stop a job, as Ctrl-C."""
    raise KeyboardInterrupt


class Known(click.ParamType[str]):
    """One word of a list; for any other the nearest known word is suggested."""

    name = "word"

    def __init__(self, what: str, words: Iterable[str]) -> None:
        self.what = what
        self.words = list(words)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the word, or fail as a usage error."""
        if value not in self.words:
            self.fail(unknown(self.what, str(value), self.words), param, ctx)
        return str(value)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return the words for the help."""
        return f"[{'|'.join(self.words)}]"


def duration(seconds: float) -> str:
    """Return a length of time as people write it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Progress:
    """The progress of a job: amount done, rate and, where the total is known, time left.

    It is shown only where this module's logger is enabled for INFO: a library user sees nothing
    unless they ask for it.
    """

    def __init__(self, label: str, total: float, unit: str, done: float = 0.0) -> None:
        """Start; what an earlier process had done does not count in the rate."""
        self.label, self.total, self.unit = label, total, unit
        self.done = self._first = done
        self.note = ""
        self._started = self._logged = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
            from rich import progress
            from rich.console import Console

            bar = progress.BarColumn() if self.total else progress.SpinnerColumn()
            text = progress.TextColumn("{task.description}", markup=False)
            self._bar = progress.Progress(bar, text, console=Console(stderr=True))
            self._task = self._bar.add_task(self.label, total=self.total or None)
            self._bar.start()
        return self

    def advance(self, amount: float, note: str = "") -> None:
        """Count `amount` more units as done; `note` is shown beside them."""
        self.done += amount
        self.note = note
        if self._bar:
            self._bar.update(self._task, completed=self.done, description=self._line())
        elif time.monotonic() - self._logged >= LINE_SECONDS:
            self._logged = time.monotonic()
            log.info("%s", self._line())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self.done > self._first:
            log.info("%s", self._line())

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self.done - self._first) / seconds
        parts = [self.label, f"{self.done:,.0f} {self.unit}"]
        if self.total:
            parts = [
                f"{self.label} {self.done / self.total:4.0%}",
                f"{self.done:,.0f} of {self.total:,.0f} {self.unit}",
            ]
        parts.append(f"{rate:,.{0 if rate >= 10 else 2}f} {self.unit}/s")
        left = (self.total - self.done) / rate if rate else 0.0
        parts.append(f"{duration(left)} left" if left > 0.5 else f"in {duration(seconds)}")
        return "  ".join([*parts, self.note] if self.note else parts)
