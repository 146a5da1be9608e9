"""How runs under the rules of domain weights end: kept in a file as they come, and in tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benches.common import Floats, Record, plus_minus, spread_of
from ddk_cache import MismatchError
from ddk_train.report.run_report import load
from ddk_train.run.directory import Run

LIVE = "DDK, live teacher"
"""The method whose targets come from a teacher in the loop."""

MORE = "more"
"""Begins the names of the runs with one share raised, from which the oracle takes its shares."""


@dataclass(frozen=True)
class Found:
    """The end of a run; arrays by domain (D)."""

    loss: Floats
    gap: Floats
    kl: Floats
    weight: Floats
    """Share of the rows drawn."""
    size: Floats
    """Training rows of the domain, which weigh the mean by size."""
    measuring: float
    """Share of the time spent on measuring gaps."""

    def behind(self) -> float:
        """Return the mean gap over the teacher, nats; where there is none it counts 0."""
        return float(np.nanmean(np.maximum(self.gap, 0)))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `Found.of` reads them."""
        return {n: v.tolist() if n != "measuring" else v for n, v in vars(self).items()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Found:
        """Return what `to_json` wrote."""
        arrays: dict[str, Any] = {n: np.array(v) for n, v in values.items() if n != "measuring"}
        return cls(**arrays, measuring=values["measuring"])


def outcome(run: Run) -> Found:
    """Read the end of a run from its directory."""
    (report,) = load([run.path])
    loss, gap, kl, rows = np.array(
        [(one.last_loss, one.gap, one.kl, one.rows) for one in report.domains], np.float64
    ).T
    sizes = np.array([row["train_rows"] for row in run.history()[-len(loss) :]], np.float64)
    return Found(loss, gap, kl, rows / rows.sum(), sizes, report.eval_share or 0.0)


class Results:
    """What each method gave for each seed, kept in the record's file as it comes."""

    FREE = ("methods", "seeds", "oracle", "intervals", "alphas", "live", "work", "base")
    """Options that a later call may change."""

    def __init__(self, record: Record, path: Path | None) -> None:
        """Take up what an earlier call left at `path`.

        Raises:
            MismatchError: it was made with other settings.
        """
        self.record, self.path = record, path
        had = json.loads(path.read_text()) if path and path.exists() else {}
        now = json.loads(json.dumps(record.facts["settings"], default=str))
        for name, value in had.get("settings", {}).items():
            if name not in self.FREE and now.get(name) != value:
                raise MismatchError(
                    f"{path}: {name}: got {value}, expected {now.get(name)}. Give another --json."
                )
        self.seeds: dict[str, dict[str, Any]] = had.get("results", {})
        record.facts["results"] = self.seeds

    def get(self, seed: int, name: str, run: Callable[[], Found]) -> Found:
        """Return a result that is kept, or run for it and keep it."""
        kept = self.seeds.setdefault(str(seed), {})
        if name not in kept:
            kept[name] = run().to_json()
            self.record.write(self.path)
        return Found.of(kept[name])

    def found(self) -> dict[str, list[Found]]:
        """Return the results of all seeds by method, as the tables show them.

        A method may have fewer seeds than the base, never others: seeds are taken in order.
        """
        found: dict[str, list[Found]] = {}
        for seed in sorted(self.seeds, key=int):
            for name, values in self.seeds[seed].items():
                if not name.startswith(MORE):
                    found.setdefault(name, []).append(Found.of(values))
        return found


def summary(found: Mapping[str, Sequence[Found]], base: str) -> list[dict[str, Any]]:
    """Return one row per method: losses, gaps, and paired differences to a base.

    The mean counts each domain once, or by its training rows. The worst gap is the largest distance
    to the teacher's loss, the sum of gaps that of all domains; "behind" is the mean gap where a
    student that is better than its teacher counts 0. A domain without held-out rows does not count.
    """
    rows = []
    for name, seeds in found.items():
        pairs = list(zip(seeds, found.get(base, seeds), strict=False))
        change = np.array([np.nanmean(one.loss - other.loss) for one, other in pairs])
        worse = np.array([np.nanmax(one.gap) - np.nanmax(other.gap) for one, other in pairs])
        behind = np.array([one.behind() - other.behind() for one, other in pairs])
        row = {
            "method": name,
            "seeds": len(seeds),
            "mean loss": plus_minus([float(np.nanmean(one.loss)) for one in seeds]),
            "mean by size": plus_minus([by_size(one) for one in seeds]),
            "worst gap": plus_minus([np.nanmax(one.gap) for one in seeds]),
            "sum of gaps": plus_minus([np.nansum(one.gap) for one in seeds], ".3f"),
            f"behind − {base}, paired": plus_minus(behind, "+.4f"),
            "KL": plus_minus([float(np.nanmean(one.kl)) for one in seeds]),
            f"mean − {base}, paired": plus_minus(change, "+.4f"),
            "better in": f"{(change < 0).sum()} of {len(change)}",
            f"worst − {base}, paired": plus_minus(worse, "+.4f"),
            "lower in": f"{(worse < 0).sum()} of {len(worse)}",
            "measuring, % of time": f"{100 * np.mean([one.measuring for one in seeds]):.1f}",
        }
        rows.append(row)
    return rows


def by_size(one: Found) -> float:
    """Return the mean loss of the measured domains, by their training rows."""
    known = ~np.isnan(one.loss)
    return float(np.average(one.loss[known], weights=one.size[known]))


def by_domain(
    found: Mapping[str, Sequence[Found]],
    domains: Sequence[str],
    figure: Callable[[Found], Floats],
    spec: str,
) -> list[dict[str, Any]]:
    """Return one row per method and one column per domain."""
    return [
        {"method": name}
        | {
            domain: plus_minus([figure(one)[n] for one in seeds], spec)
            for n, domain in enumerate(domains)
        }
        for name, seeds in found.items()
    ]


def side_by_side(
    cached: Sequence[Found], live: Sequence[Found], domains: Sequence[str]
) -> list[dict[str, Any]]:
    """Return final losses of runs from the cache and with the live teacher, by domain."""
    rows = []
    for n, domain in enumerate(domains):
        one, other = ([run.loss[n] for run in runs] for runs in (cached, live))
        change = np.subtract(one, other)
        row = {"domain": domain, "cache": plus_minus(one), "live teacher": plus_minus(other)}
        spread = max(spread_of(one), spread_of(other))
        row |= {"cache − live, paired": plus_minus(change, "+.4f")}
        rows.append(row | {"within the seeds' spread": str(bool(abs(change.mean()) <= spread))})
    return rows


def tell(
    record: Record, found: Mapping[str, Sequence[Found]], domains: Sequence[str], base: str
) -> None:
    """Print and keep all tables."""
    record.table("held-out rows: means over domains", summary(found, base))
    record.table("held-out loss, nats", by_domain(found, domains, lambda one: one.loss, ".3f"))
    perplexity = by_domain(found, domains, lambda one: np.exp(one.loss), ".1f")
    record.table("held-out perplexity", perplexity)
    record.table("gap, nats", by_domain(found, domains, lambda one: one.gap, ".3f"))
    drawn = by_domain(found, domains, lambda one: 100 * one.weight, ".1f")
    record.table("rows drawn, %", drawn)
    if LIVE in found and "DDK" in found:
        live = side_by_side(found["DDK"], found[LIVE], domains)
        record.table("DDK: cached targets compared with a live teacher", live)
