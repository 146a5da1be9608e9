"""Documents mutated at random, with and without a new seal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from stress_tests.lies import edit
from stress_tests.look import Look, Pair, apart, files_of, kind_of, look, truth_of
from stress_tests.material import Chance, make_cache
from stress_tests.report import Report, measurement

DEEP = "deep"
NUMBERS: tuple[Any, ...] = (10**400, -(10**30), 2**63, 2**40, -1, 0, 1, 0.5, 1e308, True)
VALUES = (*NUMBERS, "", "x", "\ud800", None, [], {}, [[]], float("nan"), float("inf"), DEEP)


def mutate_bytes(data: bytes, chance: Chance) -> tuple[str, bytes]:
    """Return a mutation of bytes, and what was done."""
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    noise = chance.randbytes(chance.randint(1, 8))
    how = {
        "edit": data[:a] + noise + data[a + len(noise) :],
        "insert": data[:a] + noise + data[a:],
        "delete": data[:a] + data[b:],
        "truncate": data[:a],
        "duplicate": data[:b] + data[a:b] + data[b:],
        "digit": data[:a] + b"%d" % chance.randrange(10) + data[a + 1 :],
    }
    name = chance.choice(sorted(how))
    return f"{name} at {a}, {b}", how[name]


def mutate_value(body: Any, chance: Chance) -> str:
    """Replace a random value of a document in place; return what was done."""
    path: list[Any] = []
    while isinstance(body, dict | list) and body:
        key = chance.choice(sorted(body)) if isinstance(body, dict) else chance.randrange(len(body))
        path.append(key)
        if not (isinstance(body[key], dict | list) and body[key]) or chance.random() < 0.2:
            body[key] = chance.choice(VALUES)
            return f"{path} = {str(body[key])[:30]!r}"
        body = body[key]
    return "nothing"


def mutate(path: Path, chance: Chance) -> str:
    """Mutate a document on disk; return what was done."""
    if chance.random() < 0.4:
        what, data = mutate_bytes(path.read_bytes(), chance)
        path.write_bytes(data)
        return what
    if chance.random() < 0.6 and '"seal"' in path.read_text():
        done: list[str] = []
        try:
            edit(path, lambda body: done.append(mutate_value(body, chance)))
        except ValueError:  # no seal can be made of it
            return "nothing"
        return f"sealed {done[0]}"
    body = json.loads(path.read_bytes())
    what = mutate_value(body, chance)
    deep = "[" * 10_000 + "]" * 10_000
    path.write_text(json.dumps(body, indent=1).replace(f'"{DEEP}"', deep))
    return what


def fuzz_some(root: Path, truth: Mapping[Pair, str], seeds: list[str]) -> list[tuple[str, Look]]:
    """Mutate a document for each seed and look; return what was done and seen."""
    out = []
    paths = [path for path in files_of(root) if kind_of(path, root) != "shard object"]
    for seed in seeds:
        chance = Chance(seed)
        kinds = sorted({kind_of(path, root) for path in paths})
        kind = chance.choice(kinds)
        path = chance.choice([path for path in paths if kind_of(path, root) == kind])
        whole = path.read_bytes()
        what = mutate(path, chance)
        seen = look(root, truth)
        path.write_bytes(whole)
        out.append((f"{seed}: {path.relative_to(root)}: {what}", seen))
    return out


@measurement
@click.option("--mutations", default=2000)
def fuzz(work: Path, seed: int, mutations: int) -> Report:
    """Mutate documents, sealed and not; the only permitted result is a DDKError."""
    report, classes = Report(), Counter[str]()
    root = make_cache(work, documents=5)
    truth = truth_of(root)
    seeds = [f"{seed}/{number}" for number in range(mutations)]
    for first in range(0, mutations, 100):
        some = seeds[first : first + 100]
        for what, seen in apart(fuzz_some, root, truth, some) or [(some[0], Look(other=["died"]))]:
            classes.update({f"{stage}: {name}" for stage, name, _ in seen.said} or {"nothing"})
            report.wrong += [f"{what}: {error}" for error in seen.other]
            if "sealed" not in what:
                report.wrong += [f"{what}: wrong rows of {pair}" for pair in seen.wrong]
    report.figures = {"mutations": mutations, **dict(classes.most_common())}
    return report
