"""Train a student from a cache: one step, one loop; read it from the top.

The teacher is not here: its word is in the cache. Every `interval` steps the gap of each domain is
measured and the weights move; between two measurements the loop does nothing but draw, forward,
backward and step. A run is a function of its settings: stopped anywhere, it goes on from its last
checkpoint and ends with the same student.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddk_cache import SPLITS, DDKError, InputError, SparseTargets, open_cache
from ddk_cache.console import Progress
from ddk_train import checkpoint
from ddk_train.checkpoint import State, exact, floats, get_random
from ddk_train.config import TrainConfig
from ddk_train.data.loader import Batch, Loader
from ddk_train.data.mixture import Floats, Mixture
from ddk_train.distributed import Processes
from ddk_train.evaluate import GapMeter, Measured
from ddk_train.lora import add_adapter, is_adapted
from ddk_train.loss.divergences import check_targets, divergence
from ddk_train.loss.fused import Terms
from ddk_train.loss.objective import Objective
from ddk_train.optim import learning_rate, optimizer
from ddk_train.provenance import check_identity, identity, known_rows, provenance
from ddk_train.run import Run
from ddk_train.signals import stop_requests
from ddk_train.student import load_student, load_weights, save_student
from ddk_train.weights import Settings, check_measured, given_weights, parse_weights, update

log = logging.getLogger(__name__)

TRAIN = SPLITS[0]

LiveTargets = Callable[[torch.Tensor], SparseTargets[torch.Tensor]]
"""(B, S+1) tokens → (B, S, K): the teacher in the loop, to compare with."""


def train(config: TrainConfig, *, live: LiveTargets | None = None) -> Run:
    """Train a student; go on where an earlier call with the same run directory stopped.

    `live` replaces the cached targets by what it returns, for comparing with a live teacher.

    Raises:
        DDKError: see its kinds; the message says what to do.
    """
    trainer = Trainer(config, live)
    with (
        closing(trainer.loader),
        stop_requests() as stop,
        Progress("training", config.steps, "steps", trainer.state.step) as progress,
    ):
        while trainer.at_boundary():
            for batch in trainer.until_boundary():
                metrics = trainer.step(batch)
                if trainer.processes.main:
                    progress.advance(1, trainer.note(metrics))
                if trainer.agreed(stop.requested):
                    trainer.save()
                    raise DDKError(
                        f"stopped after step {trainer.state.step} of {config.steps}. Run the same "
                        "command again to go on."
                    )
    trainer.finish()
    return trainer.run


class Trainer:
    """A student, its data and its run directory."""

    def __init__(self, config: TrainConfig, live: LiveTargets | None) -> None:
        self.config, self.live = config, live
        self.processes = Processes(config)
        self.cache = open_cache(
            config.cache,
            shard_cache=config.shard_cache,
            shard_cache_size=config.shard_cache_size,
        )
        self.run = Run(Path(config.run))
        spec = self.cache.spec
        check_targets(config.loss, config.temperature, spec)
        compiled = config.compile and self.processes.device.type == "cuda"
        terms = Terms(config.gamma, divergence(config.loss), config.temperature, compiled)
        self.student = self._student()
        self.optimizer = optimizer(self.student, config)
        if not self.run.exists:  # else it keeps to the domains that it began with
            given_weights(parse_weights(config.weights), self.cache.domains)
        known = self._open()
        rows = known_rows(self.cache, known["known_rows"])
        self.domains = sorted(rows)
        given = given_weights(parse_weights(config.weights), self.domains)
        self.settings = Settings(config.alpha, given)
        self.meter = GapMeter(
            self.cache,
            rows,
            config.eval_rows,
            config.micro,
            self.processes.device,
            share=self.processes.share,
            total=self.processes.total,
        )
        check_measured(config.weighting, [n for n, r in self.meter.rows.items() if not len(r)])
        self.mixture = Mixture(
            {name: rows[name][TRAIN] for name in self.domains},
            chunk_rows=spec.chunk_rows,
            rows=config.rows,
            seed=config.seed,
        )
        self.loader = Loader(
            self.cache,
            self.mixture,
            self.processes.device,
            share=self.processes.share,
            temperature=config.temperature,
        )
        self.checkpoint_every = config.checkpoint_every or config.interval
        self.identity = identity(self.cache, config.student)
        self.state = State(self.domains, self.mixture.state_dict())
        self.saved = (0, -1)
        self.restore()
        self.objective = Objective(self.student, terms, spec.vocab_size, self._bf16())
        if config.compile:
            self.objective.compile_body()
        self.model = self.processes.accelerator.prepare_model(self.objective)

    def _student(self) -> Any:
        """Return the student on its device, ready to be trained."""
        config, device = self.config, self.processes.device
        student = load_student(config.student, self.cache, config.seed)
        if config.lora_rank:
            if Path(config.student).suffix == ".json":
                raise InputError("--lora-rank is for a trained student; a fresh one has to learn.")
            student = add_adapter(student, config.lora_rank)
        if config.gradient_checkpointing:
            # transformers has begun to call it by another name
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
            getattr(student, new if hasattr(student, new) else old)({"use_reentrant": False})
        if self.processes.rank:  # dropout of each process has numbers of its own
            torch.manual_seed(config.seed + self.processes.rank)
        return student.to(device).train()

    def _open(self) -> dict[str, Any]:
        """Open the run directory, the process that writes before the others."""
        with self.processes.accelerator.main_process_first():
            known = self.run.open(self.config, provenance(self.cache, self.student))
        self.processes.open_trackers(self.config)
        return known

    def _bf16(self) -> bool:
        cuda_bf16 = self.processes.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return {"bf16": True, "fp32": False, "auto": cuda_bf16}[self.config.precision]

    # --- one step ---

    def step(self, batch: Batch) -> dict[str, float]:
        """Take one optimizer step and return its metrics."""
        began = time.perf_counter()
        rate = learning_rate(self.config, self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens = self._tokens(batch)
        positions = max(1, sum(tokens))
        ce, kl = (self.backward(batch, positions) / positions).tolist()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip).item()
        loss = ce + self.config.gamma * kl
        if not math.isfinite(loss + norm):
            raise DDKError(self._not_finite(batch))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._count(batch, began, tokens, loss=loss, ce=ce, kl=kl, lr=rate, grad_norm=norm)

    def _tokens(self, batch: Batch) -> list[int]:
        """Return (D) counted positions of each domain in a step, over all processes."""
        domain = torch.from_numpy(batch.draw.domain[self.processes.share])
        device = batch.loss_mask.device
        counts = torch.zeros(len(self.domains), dtype=torch.int64, device=device)
        counts.index_add_(0, domain.to(device), batch.loss_mask.sum(1))
        found: list[int] = self.processes.total(counts).tolist()
        return found

    def backward(self, batch: Batch, positions: int) -> torch.Tensor:
        """Leave the gradient of the mean loss over `positions`; return the sums of CE and KL.

        The mean is over all pieces and processes, so that it does not matter how a step is cut.
        Gradients of the processes are averaged, with the last piece; `world` undoes the average.
        """
        sums = torch.zeros(2, device=self.processes.device)
        pieces = list(batch.micro(self.config.micro))
        for number, piece in enumerate(pieces, 1):
            alone = number < len(pieces)
            with self.processes.accelerator.no_sync(self.model) if alone else nullcontext():
                targets = self.live(piece.tokens) if self.live else piece.targets
                out = self.model(piece.tokens, piece.loss_mask, targets)
                (out.loss * (self.processes.world / positions)).backward()
            sums += torch.stack([out.ce, out.divergence])
        return self.processes.total(sums)

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
        """Return what a person wants to see of a step."""
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
        saved = self.run.checkpoints()
        last = (
            f"the last checkpoint is step {saved[-1][0]}" if saved else "no checkpoint exists yet"
        )
        return (
            f"loss or gradient is not finite at step {self.state.step + 1} ({rows}). Nothing was "
            f"updated; {last}. A lower --lr may help."
        )

    def agreed(self, stop: bool) -> bool:
        """Return whether any process was asked to stop."""
        if self.processes.world == 1:
            return stop
        return bool(self.processes.total(torch.tensor(int(stop), device=self.processes.device)))

    # --- intervals ---

    def at_boundary(self) -> bool:
        """Measure and save where that is due; return whether the run goes on."""
        self.measure()
        state = self.state
        due = state.step % self.checkpoint_every == 0 or state.step in (state.best, self._end())
        if state.step and due and self.saved != (state.step, state.measured):
            self.save()
        return state.step < self._end()

    def _end(self) -> int:
        """Return the step at which the run ends, as far as is known now."""
        state, patience = self.state, self.config.patience * self.config.interval
        stale = patience and state.measured - state.best >= patience
        return state.step if stale else self.config.steps

    def until_boundary(self) -> Iterator[Batch]:
        """Yield batches up to the next measurement, checkpoint or the end."""
        step = self.state.step
        borders = [(step // n + 1) * n for n in (self.config.interval, self.checkpoint_every)]
        end = min(*borders, self.config.steps)
        return self.loader.batches(floats(self.state.weights), end - step)

    def measure(self) -> None:
        """At a measurement's step: gaps → weights → history."""
        state, config = self.state, self.config
        due = state.step % config.interval == 0 or state.step == config.steps
        if state.weights and (not due or state.measured == state.step):
            return
        self.student.eval()
        found = self.meter.measure(self.objective.measure)
        self.student.train()
        before = floats(state.log_factor) if state.log_factor else None
        after = update(config.weighting, found.gaps, before, self.settings)
        drawn, state.weights = state.weights, exact(after.weights)
        state.log_factor, state.measured = exact(after.log_factor), state.step
        state.eval_seconds += found.seconds.sum()
        self._compare(found.gaps.student_loss)
        if self.processes.main:
            self._record(found, drawn)

    def _compare(self, losses: Floats) -> None:
        """Note the best student so far, by its mean loss over domains, and what it forgets."""
        state = self.state
        measured = {n: x for n, x in zip(self.domains, losses.tolist(), strict=True) if x == x}
        mean = sum(measured.values()) / max(1, len(measured))
        if measured and (state.best_loss is None or mean < state.best_loss):
            state.best, state.best_loss = state.step, mean
        for name, loss in measured.items():
            best = state.lowest[name] = min(loss, state.lowest.get(name, loss))
            if loss - best > self.config.forgetting and self.processes.main:
                log.warning(
                    f"step {state.step}: the held-out loss of {name!r} is {loss:.3f}, "
                    f"{loss - best:.3f} above its lowest: the student forgets. More weight for it "
                    "or a lower --lr may help."
                )

    def _record(self, found: Measured, drawn: list[str]) -> None:
        """Write a measurement down; `drawn` are the weights in force up to it, if there were."""
        state, gaps, epochs = self.state, found.gaps, self.loader.epochs()
        log_factor, weights = floats(state.log_factor or []), floats(state.weights)
        before = floats(drawn or ["nan"] * len(self.domains))
        self.run.record(
            {
                "step": state.step,
                "domain": name,
                "train_rows": int(gaps.sizes[n]),
                "rows_seen": state.seen[name],
                "tokens_seen": state.tokens[name],
                "epoch": epochs[n],
                "student_loss": none_if_nan(gaps.student_loss[n]),
                "teacher_loss": none_if_nan(gaps.teacher_loss[n]),
                "student_perplexity": none_if_nan(np.exp(gaps.student_loss[n])),
                "teacher_perplexity": none_if_nan(np.exp(gaps.teacher_loss[n])),
                "kl": none_if_nan(found.kl[n]),
                "log_factor": float(log_factor[n]),
                "weight_before": none_if_nan(before[n]),
                "weight": float(weights[n]),
                "eval_seconds": float(found.seconds[n]),
            }
            for n, name in enumerate(self.domains)
        )

    # --- save and restore ---

    def save(self) -> None:
        """Write a checkpoint: all or nothing."""
        state, randoms = self.state, self.processes.each(get_random(self.processes.device))
        if self.processes.main:
            with self.run.checkpoint(state.step, self.config.keep, state.best) as path:
                checkpoint.save(path, state, self.student, self.optimizer, randoms, self.identity)
        self.processes.wait()
        self.saved = (state.step, state.measured)

    def restore(self) -> None:
        """Go on from the last whole checkpoint, if there is one."""
        step = measured = -1
        if saved := self.run.checkpoints():
            path = saved[-1][1]
            check_identity(path, self.cache)
            state = checkpoint.load(path, self.student, self.optimizer, self.processes)
            step, measured = self.saved = (state.step, state.measured)
            self.state = state.over(self.domains)
            self.mixture.load_state_dict(state.mixture)
            log.info(f"going on after step {step} of {self.config.steps}")
        if self.processes.main:
            self.run.rewind(step, measured)
        self.processes.wait()

    def finish(self) -> None:
        """Write the finished student: the last, or with patience the best."""
        self.processes.accelerator.end_training()
        if not self.processes.main:
            return
        best = dict(self.run.checkpoints()).get(self.state.best)
        if self.config.patience and best:
            load_weights(self.student, best / "student")
            log.info(f"the student is that of step {self.state.best}, the lowest held-out loss")
        student = self.student
        if is_adapted(student) and not self.config.keep_adapter:
            student = student.merge_and_unload()
        save_student(student, self.cache, self.run.student, self.identity)


# --- small things the trainer is made of ----------------------------------------------------------


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: of the GPU, or else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def none_if_nan(value: float) -> float | None:
    """Return a float that Parquet and JSON readers agree on."""
    return None if math.isnan(value) else float(value)
