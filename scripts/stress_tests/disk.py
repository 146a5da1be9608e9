"""A disk that runs full while a cache is built."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from stress_tests.kills import phase
from stress_tests.material import Chance, differences, make_corpus, run_worker, tree
from stress_tests.report import Report, measurement


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small disk; False where that is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "stress", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def space(folder: Path) -> tuple[int, int]:
    """Return the used and the free bytes of a disk."""
    usage = shutil.disk_usage(folder)
    return usage.used, usage.free


@measurement
@click.option("--moments", default=10)
def disk(work: Path, seed: int, moments: int) -> Report:
    """Fill the disk at different moments: one message, and the same command resumes afterwards."""
    report, chance = Report(), Chance(seed)
    corpus = make_corpus(work / "corpus", 12)
    with small_disk(work / "disk") as mounted:
        if not mounted:
            return Report({"skipped": "mounting a tmpfs is not permitted here"})
        run_worker(corpus, work / "disk" / "mix.zarr")
        right, needed = tree(work / "disk" / "mix.zarr"), space(work / "disk")[0]
    phases: Counter[str] = Counter()
    for moment in range(moments):
        room = int((moment + chance.random()) / moments * needed)
        with small_disk(work / "disk"):
            wrong, where = fill_up(corpus, work / "disk", room, right)
        phases[f"full while {where}"] += 1
        report.wrong += [f"with {room:,} of {needed:,} bytes: {line}" for line in wrong]
    report.figures = {"moments": moments, "bytes needed": needed, **phases}
    return report


def fill_up(
    corpus: Path, folder: Path, room: int, right: Mapping[str, str]
) -> tuple[list[str], str]:
    """Build where there is too little room, then make room; return what is wrong, and the phase."""
    filler, cache, wrong = folder / "filler", folder / "mix.zarr", []
    filler.write_bytes(bytes(space(folder)[1] - room))
    code, err = run_worker(corpus, cache)
    where = phase(cache)
    errors = [line for line in err.splitlines() if line.startswith("Error:")]
    if code != 1 or len(errors) != 1 or "Traceback" in err or "No space left" not in errors[0]:
        wrong.append(f"exit code {code}, said {err[-1000:]!r}")
    filler.unlink()
    code, err = run_worker(corpus, cache)
    if code:
        wrong.append(f"with room again: exit code {code}, said {err[-1000:]!r}")
    return [*wrong, *differences(cache, right)], where
