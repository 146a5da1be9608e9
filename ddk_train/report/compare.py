"""Several runs compared: final losses, differing settings, and the spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from ddk_train.report.numbers import number, quantity
from ddk_train.report.run_report import RunReport


def compare(reports: Sequence[RunReport]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return rows of (value, difference from the first run) per run, as text.

    Three rows for the mean and the worst domain, then one per domain. Values are final held-out
    losses in nats per position; the worst gap is the largest difference between such a loss and
    the teacher's. The mean is over the domains that every run has measured.
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
    """Runs with the same settings except for seed and directory."""

    name: str
    """The settings in which this group differs from the others."""
    reports: list[RunReport]

    def loss(self, domain: str | None = None) -> str:
        """Return a final held-out loss over seeds: mean ± standard deviation, or only the mean
        if there is one seed. `domain=None` is the mean over domains.
        """  # noqa: D205
        by_seed: dict[str, list[float]] = {}
        for report in self.reports:
            loss = report.mean.last_loss if domain is None else report.last_losses.get(domain)
            if loss is not None:
                by_seed.setdefault(str(report.settings.get("seed")), []).append(loss)
        known = np.array([np.mean(losses) for losses in by_seed.values()])
        if len(known) < 2:
            return number(float(known[0]), ".3f") if len(known) else "–"
        return f"{known.mean():.3f} ± {known.std(ddof=1):.3f}"

    @property
    def seeds(self) -> str:
        """Return the number of distinct seeds; a single one says nothing about their spread."""
        count = len({str(report.settings.get("seed")) for report in self.reports})
        return "same seed" if count == 1 < len(self.reports) else str(count)


def by_seed(reports: Sequence[RunReport]) -> list[Seeds]:
    """Return the groups of runs that differ only in seed; no group if all runs differ otherwise."""
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
    """Return rows of final held-out losses over seeds: counts, the mean, then each domain."""
    names = dict.fromkeys(d.name for group in groups for r in group.reports for d in r.domains)
    return [
        ("runs", [str(len(group.reports)) for group in groups]),
        ("seeds", [group.seeds for group in groups]),
        ("mean of domains", [group.loss() for group in groups]),
        *((name, [group.loss(name) for group in groups]) for name in names),
    ]


def particulars(reports: Sequence[RunReport]) -> list[tuple[str, list[str]]]:
    """Return rows of what else differs: length, speed, and the settings that are not equal."""
    rows = [
        ("steps", [number(report.steps, ",") for report in reports]),
        ("tokens", [quantity(report.tokens) for report in reports]),
        ("tokens per second", [quantity(report.tokens_per_second) for report in reports]),
    ]
    for name in dict.fromkeys(name for report in reports for name in report.settings):
        values = [str(report.settings.get(name, "–")) for report in reports]
        if len(set(values)) > 1 and name not in ("run", "steps"):
            rows.append((name, _apart(values)))
    return rows


def _apart(values: Sequence[str]) -> list[str]:
    """Return paths without the folders that all of them begin with; other text unchanged."""
    parts = [value.split("/") for value in values]
    levels = zip(*(folders[:-1] for folders in parts), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, levels))
    return ["/".join(["…", *names[shared:]]) if shared > 1 else "/".join(names) for names in parts]


def same_measure(reports: Sequence[RunReport]) -> bool:
    """Return whether the teacher's losses agree, that is, all runs measured on the same rows."""
    losses = [(d.name, d.teacher_loss) for report in reports for d in report.domains]
    known = {name: loss for name, loss in losses if loss is not None}
    return all(math.isclose(known[name], loss, rel_tol=1e-3) for name, loss in losses if loss)
