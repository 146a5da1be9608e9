"""Kill -9 of builders at random moments."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import click

from ddk_cache.atomic import PARTIAL
from ddk_cache.format.spec import TOKEN_ARRAYS
from ddk_cache.hashing import digest
from stress_tests.material import PATIENCE, Chance, differences, make_cache, start_worker, tree
from stress_tests.report import Report, measurement


class Workers:
    """Builders of one cache: those at work, and spares that have their imports behind them."""

    def __init__(self, corpus: Path, cache: Path, delay: float, spares: int) -> None:
        self.start = partial(start_worker, corpus, cache, delay)
        self.spares = deque(self.start() for _ in range(spares))
        self.busy: list[subprocess.Popen[str]] = []

    def fill(self, count: int) -> None:
        """Put so many more to work."""
        for _ in range(count):
            process = self.spares.popleft()
            self.spares.append(self.start())
            assert process.stdout
            assert process.stdin
            process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
            self.busy.append(process)

    def retire(self, victims: Iterable[subprocess.Popen[str]], wrong: list[str]) -> int:
        """Wait for workers that end; return how many were killed."""
        killed = 0
        for process in list(victims):
            try:
                _, err = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                _, err = process.communicate()
                wrong.append("a builder got stuck")
            self.busy.remove(process)
            killed += process.returncode == -signal.SIGKILL
            if process.returncode not in (0, -signal.SIGKILL):
                wrong.append(f"a builder exited with {process.returncode}: {err.strip()[-300:]}")
        return killed

    def close(self) -> None:
        """End all of them."""
        for process in (*self.busy, *self.spares):
            process.kill()
            process.communicate()


def committed_files(root: Path) -> dict[str, str]:
    """Return every record, and every object of its shard, with its hash."""
    found = {}
    for record in sorted(root.glob("commits/*/*/*.json")):
        domain, split = record.parts[-3:-1]
        objects = root.joinpath("domains", domain, split).glob(f"*/c/{record.stem}/**/*")
        for path in (record, *objects):
            if path.is_file():
                found[str(path)] = digest(path.read_bytes())
    return found


def phase(root: Path) -> str:
    """Return how far a build is: the furthest that any uncommitted shard has come."""
    if not (root / "zarr.json").exists():
        return "opening"
    if len(list(root.glob("plans/*.json"))) < 3:
        return "planning"
    if list(root.glob(f"commits/**/*{PARTIAL}")):
        return "committing"
    written: Counter[tuple[str, ...]] = Counter()
    for path in root.glob("domains/*/*/*/c/*"):
        _, domain, split, name, _, number = path.relative_to(root).parts
        record = root / "commits" / domain / split / f"{number}.json"
        if name not in TOKEN_ARRAYS and not record.exists():
            written[domain, split, number] += 1
    return {0: "scoring", 4: "committing"}.get(max(written.values(), default=0), "writing")


@measurement
@click.option("--kills", default=100)
@click.option("--workers", multiple=True, default=(1, 3))
def kills(work: Path, seed: int, kills: int, workers: tuple[int, ...]) -> Report:
    """Kill builders at random moments; nothing committed may go, and the end is the same bytes."""
    report, chance, made = Report(), Chance(seed), 0
    right = tree(make_cache(work, documents=20))
    cache, tally = work / "siege.zarr", Counter[str]()
    builders = Workers(work / "corpus0", cache, 0.01, max(workers))
    try:
        while tally["kills"] < kills:
            count = workers[made % len(workers)]
            siege(builders, cache, count, chance, kills, tally, report.wrong)
            report.wrong += differences(cache, right)
            shutil.rmtree(cache)
            made += 1
    finally:
        builders.close()
    lost = sum("is lost" in line for line in report.wrong)
    changed = sum("has changed" in line for line in report.wrong)
    leftover = sum("left over" in line for line in report.wrong)
    report.figures = {"caches finished": made, **dict(sorted(tally.items()))}
    report.figures |= {"files lost": lost, "files changed": changed, "leftovers": leftover}
    return report


def siege(
    builders: Workers,
    cache: Path,
    count: int,
    chance: Chance,
    kills: int,
    tally: Counter[str],
    wrong: list[str],
) -> None:
    """Build one cache, killing builders until it is finished or enough were killed."""
    builders.fill(count)
    seen: dict[str, str] = {}
    while True:
        time.sleep(chance.uniform(0, 4))
        builders.retire([b for b in builders.busy if b.poll() is not None], wrong)
        if not builders.busy or tally["kills"] >= kills:
            break
        seen |= compare_committed(seen, committed_files(cache), wrong)
        victims = [chance.choice(builders.busy)] if chance.random() < 0.8 else [*builders.busy]
        for victim in victims:
            victim.kill()
        killed = builders.retire(victims, wrong)
        tally["kills"] += killed
        tally[f"kills of {count} at work"] += killed
        tally[f"kills while {phase(cache)}"] += killed
        compare_committed(seen, committed_files(cache), wrong)
        builders.fill(killed)
    builders.retire(builders.busy, wrong)
    compare_committed(seen, committed_files(cache), wrong)


def compare_committed(
    seen: Mapping[str, str], now: dict[str, str], wrong: list[str]
) -> dict[str, str]:
    """Note what of the committed is gone or changed; return what there is now."""
    wrong += [f"{name} is lost" for name in seen.keys() - now.keys()]
    wrong += [f"{name} has changed" for name in seen.keys() & now.keys() if seen[name] != now[name]]
    return now
