"""Which process owns a temporary file, a scratch folder or a lease, and whether it still lives.

An owner is named by host, process number and start time. On the same host psutil looks the process
up, so that the leftovers of a killed process are recognized at once. About a process on another
host only the age of its file is known, which a live owner renews well within `LEASE` seconds.
"""

from __future__ import annotations

import math
import os
import re
import socket
import time
from functools import cache
from pathlib import Path

import psutil

LEASE = 120.0
"""Seconds without renewal after which what a process on another host owns is free."""

START_TOLERANCE = 5.0
"""Seconds by which two readings of one start time may differ: psutil derives it from the boot time,
which moves when the clock is set. No host reuses a process number that fast."""


def current() -> str:
    """Return the name of this process, usable as part of a file name."""
    return f"{_host()}+{os.getpid()}+{_started(os.getpid()):.0f}"


def is_name(text: str) -> bool:
    """Return whether a text has the form of `current()`."""
    return re.fullmatch(r"[^+]+\+[0-9]+\+[0-9]+", text) is not None


def alive(name: str, age: float) -> bool:
    """Return whether the named process lives; `age` is the seconds since its last renewal."""
    pid, _, start = name.partition("+")[2].partition("+")
    if is_elsewhere(name) or not pid.isdecimal():
        return age < LEASE
    try:
        return abs(_started(int(pid)) - float(start)) < START_TOLERANCE
    except (psutil.Error, OverflowError, ValueError):
        return False


def host_of(name: str) -> str:
    """Return the host of the named process."""
    return name.partition("+")[0]


def is_elsewhere(name: str) -> bool:
    """Return whether the named process runs on another host."""
    return host_of(name) != _host()


def age(path: Path) -> float:
    """Return the seconds since a file was written; infinity where there is none."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return math.inf


@cache
def _host() -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname()) or "host"


def _started(pid: int) -> float:
    """Return when a process started, in seconds since the epoch; psutil.Error where it is gone."""
    process = psutil.Process(pid)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.NoSuchProcess(pid)
    return float(process.create_time())
