"""Train a student from a cache: one step, one loop; read it from the top.

The trainer takes its parts and builds none (`ddk_train.job` does), so that a test can put its own
in their place. No teacher is needed: its outputs are in the cache. Every `interval` steps the gap
of each domain is measured and the weights move; in between, the loop only draws rows and takes
steps. A run is a function of its settings: stopped anywhere, it resumes from its last checkpoint
and ends with the same student.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from ddk_cache import Cache, DDKError, SparseTargets
from ddk_cache.console import Progress
from ddk_train.config import TrainConfig
from ddk_train.data.loader import Batch, Loader
from ddk_train.data.mixture import Floats
from ddk_train.distributed import Processes, peak_memory
from ddk_train.evaluate import GapMeter, Measured
from ddk_train.history import history_rows
from ddk_train.loss.objective import Objective, by_row, evaluating, places
from ddk_train.optim import decays, learning_rate
from ddk_train.pairs import MeasuredPairs, PairLearner
from ddk_train.run import checkpoint
from ddk_train.run.checkpoint import State, Trained, get_random
from ddk_train.run.directory import Run
from ddk_train.signals import Stop
from ddk_train.student.load import Student, load_weights, save_student
from ddk_train.student.lora import is_adapted
from ddk_train.weights.gaps import Gaps
from ddk_train.weights.moving import DomainWeights

log = logging.getLogger(__name__)

LiveTargets = Callable[..., SparseTargets[torch.Tensor]]
"""(B, S+1) tokens and, where the cache keeps documents apart, (B, S+1) positions → (B, S, K)
targets of a teacher in the loop, to compare with cached ones."""

CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)
"""Errors of writing a model or an optimizer to a full disk, by who writes."""


@dataclass(kw_only=True)
class Trainer:
    """A student, its data and its run directory."""

    config: TrainConfig
    processes: Processes
    cache: Cache
    run: Run
    loaded: Student
    """The student as it was loaded: its tokenizer and the type of its files."""
    student: Any
    """The model in training, on its device: the student's own, or with an adapter."""
    objective: Objective
    optimizer: torch.optim.Optimizer
    loader: Loader
    meter: GapMeter
    weights: DomainWeights
    identity: dict[str, Any]
    """What the student is made from; see `ddk_train.provenance`."""
    live: LiveTargets | None = None
    """A teacher in the loop that replaces the cached targets, for comparison."""
    pairs: PairLearner | None = None
    """Pairs of responses, whose gradient is added to that of the rows."""

    state: State = field(init=False)
    saved: tuple[int, int] = field(init=False, default=(0, -1))
    """Step and last measurement of the newest checkpoint."""

    def __post_init__(self) -> None:
        self.domains = self.weights.domains
        drawn = self.pairs.order.state_dict() if self.pairs else {}
        self.state = State(self.domains, self.loader.mixture.state_dict(), drawn)
        self.rows_weight = self.config.rows_weight if self.pairs else 1.0
        self.checkpoint_every = self.config.checkpoint_every or self.config.interval
        self.model = self.processes.accelerator.prepare_model(self.objective)

    def fit(self, stop: Stop, progress: Progress) -> None:
        """Train from the present state to the last step, with measurements and checkpoints.

        Raises:
            DDKError: a signal asked to stop, the loss is not finite, or the disk is full.
        """
        while True:
            self.measure_if_due()
            self.save_if_due()
            if self.state.step >= self.last_step:
                return
            for batch in self.batches_until_due():
                metrics = self.step(batch)
                if self.processes.main:
                    progress.advance(1, self.note(metrics))
                if self.agreed(stop.requested):
                    self.save()
                    raise DDKError(
                        f"stopped after step {self.state.step} of {self.config.steps}. Run the "
                        "same command again to resume where it stopped."
                    )

    # --- one step ---

    def step(self, batch: Batch) -> dict[str, float]:
        """Take one optimizer step and return its metrics."""
        began = time.perf_counter()
        rate = learning_rate(self.config, self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        of_rows = tokens = self._tokens(batch)
        positions = max(1, sum(of_rows))
        sums, ce_B = self.backward(batch, positions)
        learned = self.pairs and self.pairs.backward(self.model, self.weights.weights)
        clipped = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip)
        # The one wait for the device, but in first epochs.
        ce, kl, norm = torch.stack([*(sums / positions), clipped]).tolist()
        loss, parts = ce + self.config.gamma * kl, {"ce": ce, "kl": kl}
        if learned:
            loss = learned.metrics["pair_loss"] + self.rows_weight * loss
            parts = learned.metrics | (parts if self.rows_weight else {})
            tokens = list(map(sum, zip(tokens, learned.tokens, strict=True)))
        if not math.isfinite(loss + norm):
            raise DDKError(self._not_finite(batch))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._note_unseen(batch, ce_B, of_rows)
        if self.pairs and learned:
            self.state.pairs = self.pairs.order.state_dict()
            for name, rows in zip(self.domains, learned.rows, strict=True):
                self.state.seen[name] += rows
        return self._count(batch, began, tokens, loss=loss, **parts, lr=rate, grad_norm=norm)

    def _tokens(self, batch: Batch) -> list[int]:
        """Return (D) the counted positions of a step by domain, over all processes."""
        domain = batch.draw.domain[self.processes.share]
        counts = np.bincount(domain, batch.counted, len(self.domains)).astype(np.int64)
        if self.processes.world > 1:
            here = torch.from_numpy(counts).to(self.processes.device)
            counts = self.processes.total(here).cpu().numpy()
        return [int(count) for count in counts]

    def backward(self, batch: Batch, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave the gradient of the mean loss over `positions`; return sums of CE and KL, and CE.

        The sums (2) are over all processes; the CE of each row (B) is of this one's. The mean is
        over all pieces and processes, so that it does not matter how a step is cut. DDP averages
        the gradients of the processes at the last piece; the factor `world` turns the average into
        a sum.
        """
        sums = torch.zeros(2, device=self.processes.device)
        ce_B = [sums.new_empty(0, dtype=torch.float64)]  # a step may have no rows, only pairs
        pieces = list(batch.micro(self.config.micro))
        for number, piece in enumerate(pieces, 1):
            alone = number < len(pieces)
            with self.processes.accelerator.no_sync(self.model) if alone else nullcontext():
                own = () if piece.positions is None else (piece.positions,)
                targets = self.live(piece.tokens, *own) if self.live else piece.targets
                counted = places(piece.loss_mask, int(piece.counted.sum()))
                out = self.model(piece.tokens, counted, targets, *own)
                scale = self.rows_weight * self.processes.world / positions
                (out.loss * scale).backward()
            sums += torch.stack([out.ce, out.divergence])
            ce_B.append(by_row(out.ce_by_position, piece.loss_mask))
        return self.processes.total(sums), torch.cat(ce_B)

    def _note_unseen(self, batch: Batch, ce_B: torch.Tensor, tokens: list[int]) -> None:
        """Add the losses of the domains whose rows are drawn for the first time.

        Student and teacher are at hand: the student's is that of the step, before its update.
        After the first epochs nothing is summed, and no process waits for the device or another.
        """
        epochs = self.loader.mixture.begun(batch.state)
        first = [n for n, epoch in enumerate(epochs) if epoch == 0 and tokens[n]]
        if not first:
            return
        domain_B, D = batch.draw.domain[self.processes.share], len(self.domains)
        losses = (ce_B.cpu().numpy(), batch.teacher_loss)
        sums = [np.bincount(domain_B, loss_B, minlength=D) for loss_B in losses]
        total = self.processes.total(torch.from_numpy(np.array(sums)).to(self.processes.device))
        for n in first:
            self.state.add_unseen(self.domains[n], [*total[:, n].tolist(), tokens[n]])

    def _count(
        self, batch: Batch, began: float, tokens: list[int], **metrics: float
    ) -> dict[str, float]:
        state = self.state
        state.mixture = batch.state
        state.step += 1
        seconds = time.perf_counter() - began + batch.wait
        state.seconds += seconds
        for number, rows in enumerate(np.bincount(batch.draw.domain).tolist()):
            state.seen[self.domains[number]] += rows
        for name, count in zip(self.domains, tokens, strict=True):
            state.tokens[name] += count
        metrics |= {
            "step": state.step,
            "tokens": sum(state.tokens.values()),
            "seconds": state.seconds,
            "tokens_per_second": sum(tokens) / seconds,
            "wait": batch.wait / seconds,
            "eval_share": state.eval_seconds / (state.eval_seconds + state.seconds),
        }
        if (state.step % self.config.log_every == 0 or state.step == 1) and self.processes.main:
            self.run.log(metrics)
            self.processes.accelerator.log(metrics, state.step)
        return metrics

    def note(self, metrics: dict[str, float]) -> str:
        """Return a short line about a step, for a progress bar."""
        return (
            f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"waiting {metrics['wait']:.0%}  {peak_memory(self.processes.device) / 2**30:.1f} GiB"
        )

    def _not_finite(self, batch: Batch) -> str:
        names = self.domains
        rows = "; ".join(
            f"domain {names[n]!r}, rows {batch.draw.row[batch.draw.domain == n].tolist()}"
            for n in np.unique(batch.draw.domain)
        )
        return (
            f"loss or gradient is not finite at step {self.state.step + 1} ({rows}). Nothing was "
            f"updated; {self._last_checkpoint()}. Use a lower --lr, with a new run directory."
        )

    def _last_checkpoint(self) -> str:
        saved = self.run.checkpoints()
        return (
            f"the last checkpoint is step {saved[-1][0]}" if saved else "no checkpoint exists yet"
        )

    def agreed(self, stop: bool) -> bool:
        """Return whether any process was asked to stop."""
        if self.processes.world == 1:
            return stop
        return bool(self.processes.total(torch.tensor(int(stop), device=self.processes.device)))

    # --- intervals ---

    @property
    def last_step(self) -> int:
        """The step at which the run ends, as far as is known now: earlier if patience ran out."""
        state, patience = self.state, self.config.patience * self.config.interval
        stale = patience and state.measured - state.best >= patience
        return state.step if stale else self.config.steps

    def batches_until_due(self) -> Iterator[Batch]:
        """Yield batches up to the next measurement, checkpoint or the end."""
        step = self.state.step
        borders = [(step // n + 1) * n for n in (self.config.interval, self.checkpoint_every)]
        end = min(*borders, self.config.steps)
        return self.loader.batches(self.weights.weights, end - step)

    def measure_if_due(self) -> None:
        """Measure at the first step, each interval and the last step: gaps → weights → history."""
        state, config, weights = self.state, self.config, self.weights
        due = state.step % config.interval == 0 or state.step == config.steps
        first = weights.log_factor is None
        if not first and (not due or state.measured == state.step):
            return
        with evaluating(self.student):
            found = self.meter.measure(self.objective.measure)
            pairs = self.pairs.measure(self.objective) if self.pairs else {}
        drawn = np.full(len(self.domains), np.nan) if first else weights.weights
        weights.update(self._gaps(found))
        state.measured = state.step
        state.eval_seconds += found.seconds.sum()
        self._note_best(found)
        if self.processes.main:
            self._record(found, drawn, pairs)

    def _gaps(self, found: Measured) -> Gaps:
        """Return what the rule of weights sees: the domains in training, each with a gap."""
        state, names = self.state, self.domains
        state.settle_unseen()
        unseen = np.array([state.unseen_loss.get(name, [np.nan, np.nan]) for name in names])
        gaps = found.pick([found.domains.index(name) for name in names])
        return dataclasses.replace(
            gaps.filled(*unseen.T),
            rows_seen=np.array([state.seen[name] for name in names], np.float64),
            epochs=np.array(self.loader.epochs()),
            decaying=self.decaying,
        )

    @property
    def decaying(self) -> bool:
        """Whether the learning rate of the last step was in the decay of schedule wsd."""
        return self.state.step > 0 and decays(self.config, self.state.step - 1)

    def _note_best(self, found: Measured) -> None:
        """Note the best step so far, by mean loss over domains, and warn of a loss that rises."""
        state, losses = self.state, found.student_loss.tolist()
        measured = {n: x for n, x in zip(found.domains, losses, strict=True) if x == x}
        state.note_losses(measured, self.domains)
        for name, loss in measured.items():
            best = state.lowest[name]
            if loss - best > self.config.forgetting and self.processes.main:
                log.warning(
                    f"step {state.step}: held-out loss of {name!r} rose {loss - best:.3f} above "
                    f"its lowest ({best:.3f} → {loss:.3f}). A larger weight for it, or a lower "
                    "--lr, may help in a new run."
                )

    def _record(self, found: Measured, drawn: Floats, pairs: MeasuredPairs) -> None:
        """Add a measurement to the history; `drawn` are the (D) weights before it, or NaN."""
        log_factor = self.weights.log_factor
        assert log_factor is not None
        columns = {
            "epoch": np.array(self.loader.epochs()),
            "log_factor": log_factor,
            "weight_before": drawn,
            "weight": self.weights.weights,
        }
        trained = {n: {c: v[i] for c, v in columns.items()} for i, n in enumerate(self.domains)}
        self.run.record(history_rows(self.state, found, trained, self.decaying, pairs))

    # --- save and restore ---

    @property
    def _trained(self) -> Trained:
        parts = (self.student, self.optimizer, self.weights, self.meter, self.processes)
        return Trained(*parts)

    def save_if_due(self) -> None:
        """Write a checkpoint where one is due: at its interval, the best step and the end."""
        state = self.state
        due = state.step % self.checkpoint_every == 0 or state.step in (state.best, self.last_step)
        if state.step and due and self.saved != (state.step, state.measured):
            self.save()

    def save(self) -> None:
        """Write a checkpoint: all or nothing.

        Raises:
            DDKError: it cannot be written; the one before it stays.
        """
        state, randoms = self.state, self.processes.each(get_random(self.processes.device))
        if self.processes.main:
            try:
                with self.run.checkpoint(state.step, self.config.keep, state.best) as path:
                    checkpoint.save(path, state, self._trained, randoms, self.identity)
            except CANNOT_WRITE as error:
                raise DDKError(
                    f"the checkpoint of step {state.step} cannot be written to {self.run.path}: "
                    f"{error}. {self._last_checkpoint().capitalize()}. Make room on the disk and "
                    "run the same command again to resume."
                ) from error
        self.processes.wait()
        self.saved = (state.step, state.measured)

    def restore(self) -> None:
        """Resume from the last whole checkpoint, if there is one."""
        step = measured = -1
        with self.processes.accelerator.main_process_first():
            state = checkpoint.load_last(self.run, self.cache, self._trained)
        if state:
            step, measured = self.saved = (state.step, state.measured)
            self.state = state.over(self.domains)
            self.loader.mixture.load_state_dict(state.mixture)
            if self.pairs:
                self.pairs.order.load_state_dict(state.pairs)
            if self.processes.main:
                log.info(f"resuming after step {step} of {self.config.steps}")
        if self.processes.main:
            self.run.rewind(step, measured)
        self.processes.wait()

    def finish(self) -> None:
        """Write the finished student: the last, or with patience the best.

        Raises:
            DDKError: it cannot be written.
        """
        self.processes.accelerator.end_training()
        if not self.processes.main:
            return
        if self.config.patience and (best := dict(self.run.checkpoints()).get(self.state.best)):
            load_weights(self.student, best / "student")
            log.info(f"the student is that of step {self.state.best}, the lowest held-out loss")
        trained = self.student
        if is_adapted(trained) and not self.config.keep_adapter:
            trained = trained.merge_and_unload()
        try:
            save_student(self.loaded, trained, self.cache, self.run.student, self.identity)
        except CANNOT_WRITE as error:
            raise DDKError(
                f"the student cannot be written to {self.run.student}: {error}. Make room on the "
                "disk and run the same command again; no step is repeated."
            ) from error
