"""What the two command lines share: errors as messages, progress, words that are known.

Data go to stdout, everything said on the way to stderr. A terminal gets a live bar; a log file
gets a line every few seconds, because a bar redrawn into a file is unreadable.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

import click

from ddk_cache.errors import DDKError, unknown

LINE_SECONDS = 10.0
"""Seconds between progress lines where stderr is no terminal."""


def say(message: str) -> None:
    """Tell the person something, on stderr."""
    click.echo(message, err=True)


class Commands(click.Group):
    """A group whose commands end in one clear message, never in a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a DDKError or Ctrl-C becomes its message and exit code."""
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            return super().invoke(ctx)
        except DDKError as error:
            say(f"Error: {error}")
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            say("Stopped. Nothing that was finished is lost: the same command goes on.")
            ctx.exit(1)
        except OSError as error:
            say(f"Error: {error}")
            ctx.exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM, by which schedulers stop a job, as Ctrl-C."""
    raise KeyboardInterrupt


class Known(click.ParamType[str]):
    """One word out of a list; another gets the nearest known one pointed out."""

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
        """Show the words in the help."""
        return f"[{'|'.join(self.words)}]"


def duration(seconds: float) -> str:
    """Write a length of time as people say it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Progress:
    """How far a job is: done, rate and, where the total is known, time to go, on stderr."""

    def __init__(self, label: str, total: float, unit: str, done: float = 0.0) -> None:
        """Begin; what an earlier process had done does not count in the rate."""
        self.label, self.total, self.unit = label, total, unit
        self.done = self._first = done
        self.note = ""
        self._began = self._said = time.monotonic()
        self._live: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4)
            self._live.__enter__()
        return self

    def advance(self, amount: float, note: str = "") -> None:
        """Count `amount` more units as done; `note` says what a person may want to see now."""
        self.done += amount
        self.note = note
        if self._live:
            self._live.update(self._line())
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            say(self._line())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.__exit__(kind, error, trace)
        elif self.done > self._first:
            say(self._line())

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (self.done - self._first) / seconds
        parts = [self.label, f"{self.done:,.0f} {self.unit}"]
        if self.total:
            parts = [
                f"{self.label} {self.done / self.total:4.0%}",
                f"{self.done:,.0f} of {self.total:,.0f} {self.unit}",
            ]
        parts.append(f"{rate:,.{0 if rate >= 10 else 2}f} {self.unit}/s")
        ahead = (self.total - self.done) / rate if rate else 0.0
        parts.append(f"{duration(ahead)} left" if ahead > 0.5 else f"in {duration(seconds)}")
        return "  ".join([*parts, self.note] if self.note else parts)
