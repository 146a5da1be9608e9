"""How much of a live teacher's help each kind of target keeps.

The same student, from the same weights and the same rows in the same order, is trained under
cross-entropy, under the teacher's full distributions, and under every kind of target. All students
of one seed take a step together, so that the teacher runs once and every difference is a paired
one. The figures are the held-out loss and the KL from the teacher, and their shares of the way
from cross-entropy to full distributions.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benches.common import Record, data, json_option, plus_minus, spread_of
from benches.kinds import kinds
from benches.shared import (
    Teacher,
    batches,
    fresh_student,
    hidden_of,
    rows_of,
    teacher_of,
    warmed,
)
from ddk_cache.console import say
from ddk_train.loss.fused import Sums, Terms, fused_loss, softmax_
from ddk_train.loss.head import Gradients, Head

CE, FULL = "cross-entropy", "full distributions"

NAMES = (
    "random:50,sampled:16,sampled:32,topk:12,renormalised:12,label:12,"
    "topk:64,renormalised:64,label:64"
)

WARMUP = 4
"""The learning rate rises over the first of so many parts of the steps."""


class Dense(torch.autograd.Function):
    """CE + γ · KL(teacher ‖ student) with the whole distribution; the way of `head._Fused`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_P: torch.Tensor,
        teacher_PV: torch.Tensor,
        gamma: float,
    ) -> torch.Tensor:
        """Return the loss summed over positions, without the teacher's entropy."""
        total = torch.zeros(())
        gradients = Gradients(hidden_PH, Head(weight_VH), (*ctx.needs_input_grad[:2], False))
        for part, logits_PV in gradients.from_chunks():
            t_PV = teacher_PV[part].softmax(-1).mul_(gamma)
            t_PV.scatter_add_(-1, labels_P[part, None], torch.ones(len(t_PV), 1))
            total -= (t_PV * logits_PV).sum()
            total += (1 + gamma) * softmax_(logits_PV).sum()
            logits_PV.mul_(1 + gamma).sub_(t_PV)
        ctx.gradients = gradients.d_hidden_PH, gradients.d_weight_VH
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return what was made in the forward pass."""
        return *(gradient * grads[0] for gradient in ctx.gradients), None, None, None


def train_together(
    start: Any,
    teacher: Teacher,
    rows: Any,
    chosen: Mapping[str, Any],
    *,
    size: int,
    micro: int,
    steps: int,
    lr: float,
    gamma: float,
    seed: int,
) -> dict[str, Any]:
    """Return a student for CE, for full distributions and for each kind, after so many steps."""
    students = {name: copy.deepcopy(start) for name in (CE, FULL, *chosen)}
    optimizers = {
        name: torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
        for name, student in students.items()
    }
    torch.manual_seed(seed)
    for step, batch in zip(range(steps), batches(rows, size, seed), strict=False):
        for tokens in batch.split(micro):
            labels_P = tokens[:, 1:].reshape(-1)
            teacher_PV = teacher(tokens[:, :-1]).flatten(0, 1)
            for name, student in students.items():
                hidden = hidden_of(student, tokens)
                weight = student.lm_head.weight
                if name == FULL:
                    loss = Dense.apply(hidden, weight, labels_P, teacher_PV, gamma)  # type: ignore[no-untyped-call]
                else:
                    made = None if name == CE else chosen[name](teacher_PV, labels_P)
                    terms = Terms(0.0 if name == CE else gamma)
                    sums: Sums = fused_loss(hidden, Head(weight), labels_P, made, terms)
                    loss = sums.loss
                (loss / batch[:, 1:].numel()).backward()
        done = WARMUP * (step + 1) / steps
        for name, student in students.items():
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            for group in optimizers[name].param_groups:
                group["lr"] = lr * min(1.0, done)
            optimizers[name].step()
            optimizers[name].zero_grad()
    return students


@torch.no_grad()
def held_out(student: Any, rows: Any, teacher: Teacher) -> dict[str, float]:
    """Return the means over domains of the held-out loss and of KL(teacher ‖ student), nats."""
    losses, gaps = [], []
    weight_VH = student.lm_head.weight.bfloat16()
    for part in rows.values():
        loss = gap = count = 0.0
        for tokens in part["validation"].split(2):
            logits_PV = hidden_of(student, tokens) @ weight_VH.T
            logq_PV = logits_PV.float().log_softmax(-1)
            logt_PV = teacher(tokens[:, :-1]).flatten(0, 1).log_softmax(-1)
            loss -= logq_PV.gather(-1, tokens[:, 1:].reshape(-1, 1)).sum().item()
            gap += (logt_PV.exp() * (logt_PV - logq_PV)).sum().item()
            count += len(logq_PV)
        losses.append(loss / count)
        gaps.append(gap / count)
    return {"held-out loss": float(np.mean(losses)), "KL to the teacher": float(np.mean(gaps))}


Found = dict[str, list[dict[str, float]]]
"""By target: what `held_out` gave for each seed."""


def summary(found: Found) -> Iterator[dict[str, str]]:
    """Yield one row per kind: mean ± standard deviation over seeds, and shares.

    A share is paired: of the way from cross-entropy to full distributions in the same seed; what
    follows it is the standard error of its mean.
    """
    for name, seeds in found.items():
        row = {"target": name}
        for figure in seeds[0]:
            values, ce, full = (
                np.array([seed[figure] for seed in found[of]]) for of in (name, CE, FULL)
            )
            way = (ce - values).mean() / (ce - full).mean()
            error = spread_of((ce - values) - way * (ce - full)) / len(values) ** 0.5
            row[figure] = plus_minus(values)
            row[f"share of {figure}"] = f"{way:.1%} ± {abs(error / (ce - full).mean()):.1%}"
        yield row


@click.command()
@click.option("--steps", default=60, show_default=True)
@click.option("--warm-steps", default=150, show_default=True, help="Plain training; 0: fresh.")
@click.option("--rows", "size", default=8, show_default=True, help="Rows of 256 tokens per step.")
@click.option("--sharpness", default=1.0, show_default=True, help="Divides the teacher's logits.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--gamma", default=9.0, show_default=True, help="Weight of the divergence.")
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--each", default=400, show_default=True, help="Training rows of a domain.")
@click.option("--targets", "names", default=NAMES, show_default=True)
@click.option("--start", type=click.Path(path_type=Path), help="Folder of pre-trained students.")
@click.option("--teacher", "teacher_path", type=click.Path(path_type=Path, exists=True),
              help="Model directory.  [default: the teacher of DDK_DATA]")  # fmt: skip
@click.option("--layers", default=0, show_default=True,
              help="Layers of the teacher that are the student; 0: a fresh small one.")  # fmt: skip
@click.option("--held-out-rows", default=6, show_default=True, help="Held-out rows per domain.")
@json_option
def main(
    teacher_path: Path | None,
    layers: int,
    held_out_rows: int,
    steps: int,
    warm_steps: int,
    size: int,
    sharpness: float,
    seeds: int,
    gamma: float,
    lr: float,
    each: int,
    names: str,
    start: Path | None,
    json_path: Path | None,
) -> None:
    """Train under each kind of target; print its share of the way to full distributions."""
    teacher_path = teacher_path or data() / "teacher"
    settings = {k: v for k, v in locals().items() if k not in ("json_path", "start")}
    settings["teacher_path"] = teacher_path.name
    record = Record("retention", settings, ["torch", "transformers"])
    teacher, rows = (
        teacher_of(teacher_path, sharpness),
        rows_of(data() / "corpus", teacher_path, each),
    )
    for part in rows.values():
        part["validation"] = part["validation"][:held_out_rows]
    chosen = kinds(names)
    found: Found = {}
    for seed in range(seeds):
        began = time.perf_counter()
        student = starting_student(teacher_path, layers, rows, warm_steps, seed, start)
        students = train_together(
            student, teacher, rows, chosen,
            size=size, micro=min(size, 8), steps=steps, lr=lr, gamma=gamma, seed=100 + seed,
        )  # fmt: skip
        for name, trained in {"at the start": student, **students}.items():
            found.setdefault(name, []).append(held_out(trained, rows, teacher))
        say(f"seed {seed}: {time.perf_counter() - began:.0f} s")
        record.facts["seeds"] = found
        record.write(json_path)
    what = "fresh" if not warm_steps else f"warmed by {warm_steps} steps"
    tokens = size * 256
    record.table(
        f"student {what}, teacher's logits / {sharpness:g}, {steps} steps of {tokens:,} tokens",
        list(summary(found)),
    )
    record.write(json_path)


def starting_student(
    teacher: Path, layers: int, rows: Any, steps: int, seed: int, kept: Path | None
) -> Any:
    """Return the student that all kinds begin from; a warmed one is kept for the next call."""
    student = fresh_student(teacher, layers, seed)
    if not steps:
        return student
    name = f"warmed-{teacher.name}-{layers}-{steps}-{seed}.pt"
    path = kept / name if kept else None
    if path and path.exists():
        student.load_state_dict(torch.load(path, weights_only=True))
        return student
    warmed(student, rows, steps, 2e-4 if layers else 2e-3, seed)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(student.state_dict(), path)
    return student
