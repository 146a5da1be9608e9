"""The line of fewest bytes for each share that a student keeps, drawn from finished measurements.

`bench.py targets` gives the bytes of each kind, `bench.py retention` the shares, one file for each
student and number of tokens per step. Nothing is trained here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benches.common import Record, json_option
from benches.shared import SEQ_LEN
from benches.targets import BESIDE

KEPT = (95, 98)
"""Shares in percent whose fewest bytes are named."""


def bytes_of(facts: dict[str, Any]) -> dict[str, float]:
    """Return bytes per token by kind, from the record of `bench.py targets`.

    What every cache stores beside its targets is added to kinds that are not ours.
    """
    tables = facts["tables"]
    rows = next(rows for title, rows in tables.items() if title.endswith("bytes per token"))
    beside = sum(rows[0][name] for name in BESIDE)
    return {row["target"]: row["all"] or row["entries"] + beside for row in rows}


def shares_of(facts: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return shares of KL in percent with their errors by kind, from `bench.py retention`."""
    (rows,) = facts["tables"].values()
    shares = {}
    for row in rows:
        mean, error = row["share of KL to the teacher"].replace("%", "").split(" ± ")
        shares[row["target"]] = float(mean), float(error)
    return shares


Points = dict[str, tuple[float, float, float]]
"""By kind: bytes per token, share kept in percent, and its error."""


def fewest(points: Points, share: float) -> str:
    """Return the kind with the fewest bytes of those that keep so much."""
    enough = {kind: size for kind, (size, kept, _) in points.items() if kept >= share}
    return min(enough, key=lambda kind: enough[kind]) if enough else "none of them"


def draw(lines: dict[str, Points], out: Path) -> None:
    """Draw share over bytes: a line through the sampled kinds, single marks for the others."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "ddk"  # the same figures give the same file
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, (name, points) in enumerate(lines.items()):
        color = f"C{number}"
        sampled = [point for kind, point in points.items() if kind.startswith("sampled")]
        size, kept, error = zip(*sorted(sampled), strict=True)
        axes.errorbar(size, kept, error, color=color, marker="o", capsize=3, label=name)
        for start, mark in (("random", "s"), ("topk", "x")):
            for kind, (x, y, wide) in points.items():
                if kind.startswith(start):
                    axes.errorbar([x], [y], [wide], color=color, marker=mark, capsize=3)
    axes.set(xlabel="bytes per token, everything stored", xscale="log", ylim=(40, 100),
             ylabel="share of full distributions in held-out KL, %")  # fmt: skip
    axes.set_xticks([10, 15, 20, 30, 50, 100], ["10", "15", "20", "30", "50", "100"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="● sampled:8 … sampled:64   ■ random sampling, N = 50   × topk:64")
    figure.savefig(out, metadata={"Date": None})


@click.command()
@click.argument("records", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), help="Draw an SVG (needs matplotlib).")
@json_option
def main(json_path: Path | None, records: tuple[Path, ...], out: Path | None) -> None:
    """Put RECORDS, --json files of targets and of retention or lists, into tables and a picture."""
    record = Record("pareto", {"files": [path.name for path in records]}, [])
    found: list[dict[str, Any]] = []
    for path in records:
        kept = json.loads(path.read_text())
        found += kept if isinstance(kept, list) else [kept]
    sizes = {
        one["settings"]["teacher"]: bytes_of(one) for one in found if one["bench"] == "targets"
    }
    lines: dict[str, Points] = {}
    for one in found:
        if one["bench"] == "retention":
            teacher, tokens = one["settings"]["teacher_path"], one["settings"]["size"] * SEQ_LEN
            size, shares = sizes[teacher], shares_of(one)
            points = {kind: (size[kind], *shares[kind]) for kind in shares if kind in size}
            lines[f"{teacher}, {tokens:,} tokens per step"] = points
    kinds = dict.fromkeys(kind for points in lines.values() for kind in points)
    record.table("bytes per token", [
        {"target": kind} | {teacher: size.get(kind, "") for teacher, size in sizes.items()}
        for kind in kinds
    ])  # fmt: skip
    record.table("share of KL kept, %", [
        {"target": kind}
        | {name: "{1:.1f} ± {2:.1f}".format(*points[kind]) for name, points in lines.items()}
        for kind in kinds
    ])  # fmt: skip
    record.table("fewest bytes that keep", [
        {"student": name} | {f"{share} %": fewest(points, share) for share in KEPT}
        for name, points in lines.items()
    ])  # fmt: skip
    if out:
        draw(lines, out)
    record.write(json_path)
