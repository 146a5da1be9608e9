"""What each kind of target costs and what it loses, against full distributions.

The error is that of the gradient in the student's logits, Σ ‖ĝ − g‖² / Σ ‖g‖²: of single positions
(noise and bias), and of the mean over more and more positions, where noise averages out and bias
stays. What our kinds cost is what they take in a chunk of a cache, each array compressed as it is
stored; an id of random sampling counts three bytes, as its authors count.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import numcodecs
import numpy as np
import torch

from benches.common import Record, data, json_option
from benches.kinds import Targets, kinds
from benches.shared import SEQ_LEN, rows_of, teacher_of
from ddk_cache import CacheSpec, SparseTargets, TargetSpec
from ddk_cache.build import targets
from ddk_cache.build.scoring import as_arrays
from ddk_cache.build.tokenize import FREQUENT
from ddk_cache.build.writer import COMPRESSORS, shuffle_of
from ddk_cache.console import say
from ddk_cache.format.codec import TargetCodec
from ddk_cache.format.spec import TARGET_KINDS
from ddk_cache.types import Array

CHUNK_ROWS = 16
"""Rows of a chunk: 4,096 tokens, as in a cache."""

NAMES = (
    "topk:8,topk:12,topk:16,topk:32,topk:64,topk:128,renormalised:12,renormalised:64,"
    "label:12,label:64,random:50,sampled:8,sampled:12,sampled:16,sampled:24,sampled:32"
)

BESIDE = ("tokens", "loss_mask", "label_logprob")
"""Arrays that every cache stores beside its targets; those of the entries are not `tail_logprob`
either."""

MEANS = (2_048, 16_384, 65_536)
"""Positions over which gradients are averaged."""

WIDE = 151_936
"""A larger vocabulary, over which the ids are spread to see what longer ids cost."""


def spec_of(kind: str, vocab_size: int, compression: str) -> CacheSpec:
    """Return the spec of a cache of this kind."""
    return CacheSpec(
        seq_len=SEQ_LEN,
        vocab_size=vocab_size,
        targets=TargetSpec.parse(kind),
        holdout=0.0,
        chunk_rows=CHUNK_ROWS,
        shard_rows=CHUNK_ROWS,
        logprob_step=2.0**-10,
        teacher={},
        tokenizer={},
        compression=compression,
    )


def packed(name: str, array: Array, spec: CacheSpec) -> int:
    """Return the bytes of a chunk of an array as a store compresses it."""
    layout = spec.arrays[name]
    shuffle = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}[shuffle_of(spec, name)]
    blosc = numcodecs.Blosc(**COMPRESSORS[spec.compression], shuffle=shuffle)
    return len(blosc.encode(np.ascontiguousarray(array.astype(layout.dtype)))) + 4


def of_entries(names: Iterable[str]) -> list[str]:
    """Return the names of the arrays that hold entries."""
    return [name for name in names if name not in (*BESIDE, "tail_logprob")]


def entropy(array: Array) -> float:
    """Return the bytes of an array by the entropy of its values, each coded by itself."""
    counts = np.unique(array, return_counts=True)[1]
    return float(-(counts * np.log2(counts / array.size)).sum() / 8)


def bytes_of(
    spec: CacheSpec, scores: targets.Scores, tokens: torch.Tensor, frequent: Array
) -> tuple[dict[str, float], dict[str, Array], Targets]:
    """Return bytes per token of each array, the arrays, and the targets that a cache gives back."""
    codec, S = TargetCodec(spec, frequent.tolist()), SEQ_LEN
    stored = codec.encode(as_arrays([scores]), tokens[:, 1:].numpy())
    stored["tokens"], stored["loss_mask"] = tokens.numpy(), np.ones((len(tokens), S))
    size = {name: packed(name, stored[name], spec) / (len(tokens) * S) for name in spec.arrays}
    kept = vars(codec.targets(stored)).values()
    return size, stored, SparseTargets(*(torch.from_numpy(part).flatten(0, 1) for part in kept))


class Errors:
    """Sums of what a kind loses over the positions that it has seen."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.means: dict[int, list[float]] = defaultdict(list)
        self.part: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def add(self, made: Targets, t_PV: torch.Tensor, q_PV: torch.Tensor) -> None:
        """Compare targets of some positions with teacher and student distributions."""
        P, V = t_PV.shape
        ids = made.ids.where(made.ids >= 0, made.ids[:, :1])  # padding repeats the first entry
        s_PV = torch.zeros_like(t_PV).scatter_add_(-1, ids, made.probs.to(t_PV.dtype))
        # The tail bucket pulls every id outside by the same factor; see ddk_train.loss.divergences.
        kept = torch.zeros_like(t_PV, dtype=torch.bool).scatter_(-1, ids, True)
        outside_P1 = q_PV.where(~kept, 0.0).sum(-1, keepdim=True).clamp(min=1e-30)
        s_PV = s_PV.where(kept, q_PV * (made.tail[:, None] / outside_P1).to(q_PV.dtype))
        exact, error = q_PV - t_PV, s_PV - t_PV
        outside = (V - kept.sum(-1, keepdim=True)).clamp(min=1)
        even = (made.tail[:, None] / outside).to(t_PV.dtype)
        flat = torch.where(kept, s_PV, even)
        self.sums["positions"] += P
        self.sums["ids"] += float((made.probs > 0).sum())
        self.sums["wrong"] += float((error**2).sum())
        self.sums["right"] += float((exact**2).sum())
        self.sums["variation"] += float((flat - t_PV).abs().sum()) / 2
        self.sums["tail"] += float((t_PV * ~kept).sum())
        kl_P = (torch.xlogy(t_PV, t_PV) - torch.xlogy(t_PV, flat)).sum(-1)
        self.sums["kl"] += float(kl_P.sum())
        for size in MEANS:
            wrong, right, count = self.part.get(size, (0.0, 0.0, 0))
            wrong, right, count = wrong + error.sum(0), right + exact.sum(0), count + P
            if count >= size:
                self.means[size].append(float((wrong**2).sum() / (right**2).sum()))
                wrong, right, count = torch.zeros(V), torch.zeros(V), 0
            self.part[size] = (wrong, right, count)

    def row(self) -> dict[str, Any]:
        """Return the figures."""
        P = self.sums["positions"]
        kl = self.sums["kl"] / P
        found = {
            "distinct ids": self.sums["ids"] / P,
            "KL, nats": kl if np.isfinite(kl) else "∞",
            "TV": self.sums["variation"] / P,
            "mass outside": self.sums["tail"] / P,
            "error²: position": self.sums["wrong"] / self.sums["right"],
        }
        return found | {
            f"mean of {size:,}": float(np.mean(self.means[size] or [np.nan])) for size in MEANS
        }


@click.command()
@click.option("--rows", default=2 * CHUNK_ROWS, show_default=True, help="Rows per domain.")
@click.option(
    "--warm-steps",
    default=150,
    show_default=True,
    help="Training steps before.",
)
@click.option("--targets", "names", default=NAMES, show_default=True)
@click.option("--start", type=click.Path(path_type=Path), help="Folder of pre-trained students.")
@click.option("--teacher", "teacher_path", type=click.Path(path_type=Path, exists=True),
              help="Model directory.  [default: the teacher of DDK_DATA]")  # fmt: skip
@click.option("--layers", default=0, show_default=True,
              help="Layers of the teacher that are the student; 0: a fresh small one.")  # fmt: skip
@click.option("--sharpness", "sharpnesses", multiple=True, type=float, default=(1.0, 0.6),
              show_default=True, help="Divisor of the teacher's logits.")  # fmt: skip
@json_option
def main(
    rows: int,
    warm_steps: int,
    names: str,
    start: Path | None,
    teacher_path: Path | None,
    layers: int,
    sharpnesses: tuple[float, ...],
    json_path: Path | None,
) -> None:
    """Measure bytes and errors of every kind of target."""
    from benches.retention import starting_student

    settings = {k: v for k, v in locals().items() if isinstance(v, (int, str)) and k != "start"}
    teacher_path = teacher_path or data() / "teacher"
    settings["teacher"] = teacher_path.name
    record = Record("targets", settings, ["torch", "numcodecs", "zarr"])
    teacher, material = teacher_of(teacher_path), rows_of(data() / "corpus", teacher_path, 400)
    vocab_size = teacher(torch.zeros(1, 1, dtype=torch.long)).shape[-1]
    student = starting_student(teacher_path, layers, material, warm_steps, 0, start)
    made = kinds(names)
    ours = [name for name in made if name.split(":")[0] in TARGET_KINDS]
    for sharpness in sharpnesses:
        errors: dict[str, Errors] = defaultdict(Errors)
        sizes: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        order_0: dict[str, list[float]] = defaultdict(list)
        wide: dict[str, list[float]] = defaultdict(list)
        for domain, part in material.items():
            say(f"logits / {sharpness:g}: {domain}")
            tokens = part["train"][:rows]
            counts = np.bincount(part["train"].flatten().numpy(), minlength=vocab_size)
            frequent = np.argsort(-counts, kind="stable")[:FREQUENT]
            for batch in tokens.split(CHUNK_ROWS):
                logits = torch.cat([teacher(b[:, :-1]) for b in batch.split(4)]) / sharpness
                stored = {}
                for kind in ours:
                    spec = spec_of(kind, vocab_size, "small")
                    scores = targets.extract(logits, batch[:, 1:], spec.targets)
                    size, arrays, stored[kind] = bytes_of(spec, scores, batch, frequent)
                    for name, value in size.items():
                        sizes[kind][name].append(value)
                    alone = sum(entropy(arrays[name]) for name in of_entries(spec.arrays))
                    order_0[kind].append(alone / batch[:, 1:].numel())
                    wider = torch.where(scores.ids < 0, -1, scores.ids * WIDE // vocab_size)
                    spread = scores._replace(ids=wider)
                    spec = spec_of(kind, WIDE, "small")
                    far = batch * WIDE // vocab_size
                    more, _, _ = bytes_of(spec, spread, far, frequent * WIDE // vocab_size)
                    wide[kind].append(sum(more.values()))
                compare(made, stored, logits, batch, student, errors)
        record.table(f"logits / {sharpness:g}: bytes per token", cost(sizes, order_0, wide, errors))
        record.table(
            f"logits / {sharpness:g}: what is lost",
            [{"target": name} | error.row() for name, error in errors.items()],
        )
        record.write(json_path)


@torch.no_grad()
def compare(
    made: Any,
    stored: dict[str, Targets],
    logits_BSV: torch.Tensor,
    tokens: torch.Tensor,
    student: Any,
    errors: dict[str, Errors],
) -> None:
    """Add the errors of every kind on some rows; ours as they come back from a cache."""
    for first in range(0, len(tokens), 2):
        some = slice(first, first + 2)
        places = slice(first * SEQ_LEN, (first + 2) * SEQ_LEN)
        logits_PV = logits_BSV[some].flatten(0, 1)
        t_PV = logits_PV.softmax(-1)
        q_PV = (
            student(input_ids=tokens[some, :-1], use_cache=False).logits.flatten(0, 1).softmax(-1)
        )
        labels_P = tokens[some, 1:].reshape(-1)
        for name, make in made.items():
            if name in stored:
                kept = stored[name].map(operator.itemgetter(places))
            else:
                kept = make(logits_PV, labels_P)
            errors[name].add(kept, t_PV, q_PV)


def cost(
    sizes: dict[str, dict[str, list[float]]],
    order_0: dict[str, list[float]],
    wide: dict[str, list[float]],
    errors: dict[str, Errors],
) -> list[dict[str, Any]]:
    """Return the table of bytes."""
    rows: list[dict[str, Any]] = []
    for kind, arrays in sizes.items():
        each = {name: float(np.mean(values)) for name, values in arrays.items()}
        entries = sum(each[name] for name in of_entries(each))
        rows.append(
            {"target": kind}
            | each
            | {"entries": entries, "entries, order-0": float(np.mean(order_0[kind]))}
            | {"all": sum(each.values())}
            | {f"all, V {WIDE:,}": float(np.mean(wide[kind]))}
        )
    for name, error in errors.items():
        if name.startswith("random"):
            drawn = error.row()["distinct ids"]
            rows.append(dict.fromkeys(rows[0], "") | {"target": name, "entries": 3 * drawn})
    return rows
