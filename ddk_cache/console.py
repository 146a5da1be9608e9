"""What the two command lines share: errors as messages, log records and progress on stderr.

The library logs and never prints; the commands attach a handler that writes the records of one
rank to stderr. Data go to stdout. A terminal gets a progress bar; a log file gets a line every few
seconds, because a bar that is redrawn into a file is unreadable.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import itertools
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping
from types import FrameType, NoneType, TracebackType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import click

from ddk_cache.errors import DDKError, unknown

LINE_SECONDS = 10.0
"""Seconds between progress lines where stderr is not a terminal."""

LOGGERS = ("ddk_cache", "ddk_train")

log = logging.getLogger(__name__)

Command = TypeVar("Command", bound=Callable[..., Any])
Config = TypeVar("Config")


def say(message: str) -> None:
    """Print a message on stderr."""
    click.echo(message, err=True)


class Handler(logging.Handler):
    """Log records as plain lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of a record."""
        say(record.getMessage())


def show_logs(first: bool) -> None:
    """Write log records to stderr: all of the first process, warnings of the others."""
    level = logging.INFO if first else logging.WARNING
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
        show_logs(first=os.environ.get("RANK", "0") == "0")
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


# --- options from a dataclass ---------------------------------------------------------------------


def options_from(
    config: type,
    *,
    choices: Mapping[str, Iterable[str]] | None = None,
    skip: Container[str] = (),
) -> Callable[[Command], Command]:
    """Return a decorator that gives a command one option per field of a dataclass.

    Name, type and default are those of the field, and the help is the text under it, in which a
    field's name in backticks becomes its option. A bool gets `--x / --no-x`, a tuple an option
    that may be repeated (`temperatures` is `--temperature`), a field without a default a required
    option. `choices` lists the words that a field takes; fields in `skip` get no option.
    """
    hints, texts = get_type_hints(config), field_texts(config)
    fields = [field for field in dataclasses.fields(config) if field.name not in skip]
    options = [
        _option(field, hints[field.name], _help(texts, field.name), (choices or {}).get(field.name))
        for field in fields
    ]

    def give(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return give


def config_from(config: type[Config], options: dict[str, Any]) -> Config:
    """Return a dataclass of those options that are its fields; they are taken out of `options`."""
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    return config(**{name: options.pop(name) for name in names})


def field_texts(config: type) -> dict[str, str]:
    """Return the text under each field of a dataclass, on one line, where there is one.

    Python keeps no such text at run time, so it is read from the source of the class.
    """
    body = ast.parse(inspect.cleandoc(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _help(texts: Mapping[str, str], name: str) -> str:
    def plain(match: re.Match[str]) -> str:
        word = match[1]
        return "--" + word.replace("_", "-") if word in texts else word

    return re.sub("`(.*?)`", plain, texts.get(name, ""))


def _option(
    field: dataclasses.Field[Any], hint: Any, text: str, words: Iterable[str] | None
) -> Callable[[Command], Command]:
    several = get_origin(hint) is tuple
    kind = next(kind for kind in get_args(hint) or (hint,) if kind is not NoneType)
    option = "--" + field.name.replace("_", "-")
    if kind is bool:
        option = f"{option}/--no-{option[2:]}"
    default: dict[str, Any] = {"required": True}
    if field.default is not dataclasses.MISSING:
        shown = kind is not bool and field.default not in ("", (), None)
        default = {"default": field.default, "show_default": shown}
    return click.option(
        option.removesuffix("s") if several else option,
        field.name,
        type=Known(field.name.replace("_", " "), words) if words else kind,
        multiple=several,
        help=text,
        **default,
    )


# --- progress -------------------------------------------------------------------------------------


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
