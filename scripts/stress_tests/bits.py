"""Single flipped bits in every kind of file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from stress_tests.look import files_of, kind_of, look, truth_of
from stress_tests.material import Chance, make_cache
from stress_tests.report import Report, measurement


@measurement
@click.option("--flips", default=1000)
def bits(work: Path, seed: int, flips: int) -> Report:
    """Flip single bits of every kind of file; each flip must be found, and none may be read."""
    report, chance = Report(), Chance(seed)
    root = make_cache(work, documents=8)
    truth, paths = truth_of(root), files_of(root)
    sizes = [path.stat().st_size for path in paths]
    done: Counter[str] = Counter()
    for number in range(flips):
        path = chance.choice(paths) if number % 2 else chance.choices(paths, sizes)[0]
        whole = path.read_bytes()
        place = chance.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        seen = look(root, truth)
        path.write_bytes(whole)
        done[kind_of(path, root)] += 1
        what = f"bit {place} of {path.relative_to(root)}"
        found = seen.found("open", "verify")
        report.wrong += [] if found else [f"{what} was not found"]
        report.wrong += [f"{what}: wrong rows of {pair}" for pair in seen.wrong]
        report.wrong += [f"{what}: {error}" for error in seen.other]
    report.figures = {"flips": flips, **{f"of a {kind}": n for kind, n in sorted(done.items())}}
    missed = sum("was not found" in line for line in report.wrong)
    silent = sum("wrong rows" in line for line in report.wrong)
    report.figures |= {"found": flips - missed, "silently wrong": silent}
    report.figures["other exceptions"] = len(report.wrong) - missed - silent
    return report
