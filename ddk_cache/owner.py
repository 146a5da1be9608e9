"""Whose temporary file, scratch folder or claim something is, and whether its owner still lives.

An owner is named by machine, process number and moment of birth. On the same machine that is
looked up, so that what a killed process left is known at once; of another machine only the age
of a file can be judged, against a lease that a live owner keeps renewing.
"""

from __future__ import annotations

import math
import os
import socket
import time
from functools import cache
from pathlib import Path

LEASE = 120.0
"""Seconds without a sign of life after which what belongs to a process elsewhere is free."""


def owner() -> str:
    """Return the name of this process, usable as part of a file's name."""
    return f"{_host()}+{os.getpid()}+{_born(os.getpid())}"


def alive(name: str, age: float) -> bool:
    """Return whether the process named lives; `age` is the seconds since its last sign of life."""
    host, _, rest = name.partition("+")
    pid, _, birth = rest.partition("+")
    if host == _host() and pid.isdecimal():
        return birth != "" and _born(int(pid)) == birth
    return age < LEASE


def age(path: Path) -> float:
    """Return the seconds since a file was written; infinity where there is none."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return math.inf


@cache
def _host() -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname()) or "host"


def _born(pid: int) -> str:
    """Return when a process was started, in ticks since boot; empty where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
