"""Several runs → how far each got, what tells them apart, and how much of that is the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from ddk_train.report.numbers import number, quantity
from ddk_train.report.run_report import RunReport


def compare(reports: Sequence[RunReport]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return how far runs got: rows of a value and its difference to the first run, as text.

    Three rows for the mean and for the worst domain, then one for each domain. Values are final
    held-out losses; the worst gap is of such a loss to the teacher's. The mean is over the
    domains that every run has measured, so that it compares like with like.
    """
    found = [report.last_losses for report in reports]
    names = dict.fromkeys(name for losses in found for name in losses)
    rows = [(name, [losses.get(name) for losses in found]) for name in names]
    shared = np.array([losses for _, losses in rows if None not in losses], np.float64)
    means = shared.mean(axis=0).tolist() if len(shared) else [None] * len(reports)
    worst = [report.worst for report in reports]
    return [
        ("mean of domains", _differences(means)),
        ("worst gap", _differences([one.gap if one else None for one in worst])),
        ("worst domain", [(one.name if one else "–", "") for one in worst]),
        *((name, _differences(losses)) for name, losses in rows),
    ]


def _differences(losses: Sequence[float | None]) -> list[tuple[str, str]]:
    first = losses[0]
    cells = [(number(first, ".3f"), "")]
    for loss in losses[1:]:
        change = "" if loss is None or first is None else number(loss - first, "+z.3f")
        cells.append((number(loss, ".3f"), change))
    return cells


@dataclass(frozen=True)
class Seeds:
    """Runs that differ in nothing but their seed and their directory."""

    name: str
    """The settings that tell it from other such groups."""
    reports: list[RunReport]

    def loss(self, domain: str | None = None) -> str:
        """Return mean ± standard deviation of a final held-out loss; None is the mean's."""
        ends = [
            report.mean.last_loss if domain is None else report.last_losses.get(domain)
            for report in self.reports
        ]
        known = np.array([loss for loss in ends if loss is not None])
        if len(known) < 2:
            return number(float(known[0]), ".3f") if len(known) else "–"
        return f"{known.mean():.3f} ± {known.std(ddof=1):.3f}"


def by_seed(reports: Sequence[RunReport]) -> list[Seeds]:
    """Return the groups of runs that differ only in seed; none if every run is its own."""
    groups: dict[str, list[RunReport]] = {}
    for report in reports:
        same = {k: v for k, v in report.settings.items() if k not in ("run", "seed")}
        groups.setdefault(repr(sorted(same.items())), []).append(report)
    if len(groups) == len(reports):
        return []
    firsts = [group[0].settings for group in groups.values()]
    differing = [
        name
        for name in dict.fromkeys(name for settings in firsts for name in settings)
        if name not in ("run", "seed") and len({str(s.get(name)) for s in firsts}) > 1
    ]
    return [
        Seeds(", ".join(f"{n} {first.get(n)}" for n in differing) or "all runs", group)
        for first, group in zip(firsts, groups.values(), strict=True)
    ]


def spread(groups: Sequence[Seeds]) -> list[tuple[str, list[str]]]:
    """Return final held-out losses over seeds: a row for the mean, then for each domain."""
    names = dict.fromkeys(d.name for group in groups for r in group.reports for d in r.domains)
    return [
        ("runs", [str(len(group.reports)) for group in groups]),
        ("mean of domains", [group.loss() for group in groups]),
        *((name, [group.loss(name) for group in groups]) for name in names),
    ]


def particulars(reports: Sequence[RunReport]) -> list[tuple[str, list[str]]]:
    """Return what else tells runs apart: how long they trained, and the settings that differ."""
    rows = [
        ("steps", [number(report.steps, ",") for report in reports]),
        ("tokens", [quantity(report.tokens) for report in reports]),
        ("tokens a second", [quantity(report.tokens_per_second) for report in reports]),
    ]
    for name in dict.fromkeys(name for report in reports for name in report.settings):
        values = [str(report.settings.get(name, "–")) for report in reports]
        if len(set(values)) > 1 and name not in ("run", "steps"):
            rows.append((name, _apart(values)))
    return rows


def _apart(values: Sequence[str]) -> list[str]:
    """Return paths without the folders that all of them begin with; other words as they are."""
    parts = [value.split("/") for value in values]
    levels = zip(*(folders[:-1] for folders in parts), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, levels))
    return ["/".join(["…", *names[shared:]]) if shared > 1 else "/".join(names) for names in parts]


def same_measure(reports: Sequence[RunReport]) -> bool:
    """Return whether the teacher's losses agree: the same rows were held out by every run."""
    losses = [(d.name, d.teacher_loss) for report in reports for d in report.domains]
    known = {name: loss for name, loss in losses if loss is not None}
    return all(math.isclose(known[name], loss, rel_tol=1e-3) for name, loss in losses if loss)
