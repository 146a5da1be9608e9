"""What one run directory contains, as plain values.

Everything is computed from the run directory alone, so a report can be made on any machine, of a
run that is still training or of one that finished long ago. Losses are nats per position on
held-out rows. A value that was not measured is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk_cache import DDKError
from ddk_train.report.numbers import finite, perplexity
from ddk_train.run.directory import open_run

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Domain:
    """A domain of a run at its first and at its last measurement."""

    name: str
    teacher_loss: float | None
    first_loss: float | None
    last_loss: float | None
    kl: float | None
    """KL(teacher ‖ student) at the end, nats per position."""
    first_weight: float
    last_weight: float
    rows: int
    tokens: int
    epochs: float | None
    unseen_gap: float | None = None
    """The gap on training rows that were drawn for the first time, in the latest interval that had
    any; it lags behind the gap on held-out rows, since the student learned meanwhile."""
    left_out: bool = False
    """The run does not train on it."""

    @property
    def gap(self) -> float | None:
        """Return the student's final loss minus the teacher's."""
        return difference(self.last_loss, self.teacher_loss)


@dataclass(frozen=True)
class RunReport:
    """The content of a run directory."""

    name: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    metrics: list[dict[str, Any]]
    """The logged steps; see `Run.metrics`. Any value except the step may be missing."""
    history: list[dict[str, Any]]
    """The measurements; see `ddk_train.run.HISTORY`. Never empty."""

    @cached_property
    def measured(self) -> list[int]:
        """Return the steps after which gaps were measured."""
        return sorted({row["step"] for row in self.history})

    @cached_property
    def domains(self) -> list[Domain]:
        """Return the domains, in the order of the history."""
        by_name: dict[str, list[dict[str, Any]]] = {}
        for row in self.history:
            by_name.setdefault(row["domain"], []).append(row)
        return [
            Domain(
                name,
                teacher_loss=finite(rows[-1]["teacher_loss"]),
                first_loss=finite(rows[0]["student_loss"]),
                last_loss=finite(rows[-1]["student_loss"]),
                kl=finite(rows[-1].get("kl")),
                first_weight=rows[0]["weight"],
                last_weight=rows[-1]["weight"],
                rows=rows[-1]["rows_seen"],
                tokens=rows[-1]["tokens_seen"],
                epochs=finite(rows[-1]["epoch"]),
                unseen_gap=difference(
                    finite(rows[-1].get("unseen_student_loss")),
                    finite(rows[-1].get("unseen_teacher_loss")),
                ),
                left_out=not any(row["weight"] for row in rows),
            )
            for name, rows in by_name.items()
        ]

    @property
    def last_losses(self) -> dict[str, float | None]:
        """Return the final held-out loss of each domain."""
        return {domain.name: domain.last_loss for domain in self.domains}

    @cached_property
    def mean(self) -> Domain:
        """Return the mean loss over domains, each counted once, and the total rows and tokens."""

        def mean(losses: Iterable[float | None]) -> float | None:
            known = [loss for loss in losses if loss is not None]
            return fmean(known) if known else None

        return Domain(
            "mean",
            teacher_loss=mean(d.teacher_loss for d in self.domains),
            first_loss=mean(d.first_loss for d in self.domains),
            last_loss=mean(d.last_loss for d in self.domains),
            kl=mean(d.kl for d in self.domains),
            first_weight=sum(d.first_weight for d in self.domains),
            last_weight=sum(d.last_weight for d in self.domains),
            rows=sum(d.rows for d in self.domains),
            tokens=sum(d.tokens for d in self.domains),
            epochs=None,
            unseen_gap=mean(d.unseen_gap for d in self.domains),
        )

    @property
    def worst(self) -> Domain | None:
        """Return the domain with the largest final gap, of those that the run trains on."""
        trained = [domain for domain in self.domains if not domain.left_out]
        known = [(domain.gap, domain) for domain in trained if domain.gap is not None]
        return max(known, key=lambda pair: pair[0], default=(None, None))[1]

    @property
    def steps(self) -> int:
        """Return the last step that was logged or measured."""
        return max([*self.measured, *(int(line["step"]) for line in self.metrics)])

    @property
    def tokens(self) -> int:
        """Return the number of tokens trained on at the last logged or measured step."""
        return max([self.mean.tokens, *(int(line.get("tokens") or 0) for line in self.metrics)])

    @property
    def tokens_per_second(self) -> float | None:
        """Return the mean speed of training."""
        last = self.metrics[-1] if self.metrics else {}
        tokens, seconds = finite(last.get("tokens")), finite(last.get("seconds"))
        return tokens / seconds if tokens and seconds else None

    @property
    def eval_share(self) -> float | None:
        """Return the share of the time spent measuring gaps."""
        spent = sum(finite(row.get("eval_seconds")) or 0 for row in self.history)
        seconds = finite(self.metrics[-1].get("seconds")) if self.metrics else None
        return spent / (spent + seconds) if spent and seconds else None

    @property
    def preferred(self) -> float | None:
        """Return the share of held-out pairs in which the teacher's response has the larger reward,
        at the last measurement: the mean over domains. None for a run without pairs.
        """  # noqa: D205
        last = [finite(r.get("preferred")) for r in self.history if r["step"] == self.measured[-1]]
        known = [share for share in last if share is not None]
        return fmean(known) if known else None

    @property
    def cache(self) -> list[tuple[str, str]]:
        """Return what the run recorded about its cache, as labels and text."""
        known = self.provenance
        extents = [
            (split, int(rows))
            for splits in known.get("known_rows", {}).values()
            for split, runs in splits.items()
            for _, rows in runs
        ]
        counts = {split: sum(n for s, n in extents if s == split) for split, _ in extents}
        rows = " + ".join(f"{count:,} {split}" for split, count in counts.items())
        named = {"Cache": self.settings.get("cache"), "Identity": known.get("cache_fingerprint")}
        named |= {"Teacher": known.get("teacher"), "Targets": known.get("targets")}
        named |= {"Rows": rows, "Tokens per row": known.get("seq_len")}
        return [(name, str(value)) for name, value in named.items() if value]

    def logged(self, name: str) -> tuple[Floats, Floats]:
        """Return (N) steps and (N) values of a metric where it is logged and finite."""
        pairs = [(line["step"], finite(line.get(name))) for line in self.metrics]
        known = np.array([pair for pair in pairs if pair[1] is not None], np.float64).reshape(-1, 2)
        return known[:, 0], known[:, 1]

    def over_steps(self, column: str) -> Floats:
        """Return (D, M) values of a column of the history, NaN where it is missing."""
        found = {(row["domain"], row["step"]): finite(row.get(column)) for row in self.history}
        values = [[found.get((d.name, step)) for step in self.measured] for d in self.domains]
        return np.array(values, np.float64)


def difference(one: float | None, other: float | None) -> float | None:
    """Return the difference of two losses, or None where one is missing."""
    return None if one is None or other is None else one - other


def load(paths: Sequence[Path]) -> list[RunReport]:
    """Read run directories; one that is named twice is read once.

    Raises:
        InputError: a path is not a run directory.
        DDKError: a run has no measurement yet, or its files are damaged.
    """
    whole = list(dict.fromkeys(path.resolve() for path in paths))
    return [_load(name, path) for name, path in zip(short_names(whole), whole, strict=True)]


def _load(name: str, path: Path) -> RunReport:
    try:
        run = open_run(path)
        config = run.config
        parts = config["settings"], config.get("provenance", {}), run.metrics(), run.history()
        report = RunReport(name, *parts)
        # Computes every value once, so that damage shows here and not halfway through a page.
        _ = to_json([report]), report.cache, report.over_steps("weight"), report.logged("loss")
        return report
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DDKError(
            f"{path} cannot be reported: its files are damaged ({type(error).__name__}: {error}). "
            "Resume the run from its last checkpoint, or leave it out."
        ) from error


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of distinct paths, as few as distinguish them."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    # Names may contain bytes that are not Unicode, and control characters for the terminal.
    return ["".join(c if c.isprintable() else "?" for c in name) for name in names]


def to_json(reports: Sequence[RunReport]) -> list[dict[str, Any]]:
    """Return each run as plain JSON values."""
    return [
        {
            "name": report.name,
            "steps": report.steps,
            "tokens": report.tokens,
            "tokens_per_second": report.tokens_per_second,
            "eval_share": report.eval_share,
            "measured": report.measured,
            "mean_loss": report.mean.last_loss,
            "worst": report.worst and report.worst.name,
            "preferred": report.preferred,
            "domains": {
                domain.name: asdict(domain) | {"ratio": perplexity(domain.gap)}
                for domain in report.domains
            },
            "settings": report.settings,
            "provenance": report.provenance,
        }
        for report in reports
    ]
