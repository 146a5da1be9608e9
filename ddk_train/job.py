"""A training run from its settings: open the cache, the run directory and the student, and train.

This is the only place that builds the parts of a run. Everything is opened and checked before the
first byte is written, so that a refused call leaves nothing behind; the price is that a wrong
setting of a large student is found only after it was loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddk_cache import TRAIN, Cache, InputError, MismatchError, open_cache, open_pairs
from ddk_cache.console import Progress
from ddk_train.config import TrainConfig
from ddk_train.data.loader import Loader
from ddk_train.data.mixture import Mixture
from ddk_train.distributed import Processes
from ddk_train.evaluate import GapMeter, Known
from ddk_train.loss.divergences import check_targets, divergence
from ddk_train.loss.fused import Terms
from ddk_train.loss.objective import Objective, require_isolation
from ddk_train.loss.preference import PairTerms
from ddk_train.optim import learning_rate, optimizer
from ddk_train.pairs import PairLearner, pair_identity
from ddk_train.provenance import identity, known_rows, provenance
from ddk_train.run.directory import Run
from ddk_train.signals import stop_requests
from ddk_train.student.load import Student, load_student
from ddk_train.student.lora import add_adapter
from ddk_train.trainer import LiveTargets, Trainer
from ddk_train.weights.given import chosen_domains, parse_weights
from ddk_train.weights.moving import DomainWeights

log = logging.getLogger(__name__)


def train(config: TrainConfig, *, live: LiveTargets | None = None) -> Run:
    """Train a student; resume where an earlier call with the same run directory stopped.

    `live` replaces the cached targets by those that it returns, to compare with a live teacher.

    Raises:
        InputError: the call cannot be met: a path, a setting, or a run directory in use.
        MismatchError: cache, student and run directory do not belong together.
        DDKError: the run failed or was stopped; the message says how to resume.
    """
    processes, run = Processes(config), Run(Path(config.run))
    with run.locked() if processes.main else nullcontext():
        trainer = assemble(config, processes, run, live)
        with closing(trainer.loader):
            trainer.restore()
            with (
                stop_requests() as stop,
                Progress("training", config.steps, "steps", trainer.state.step) as progress,
            ):
                trainer.fit(stop, progress)
        trainer.finish()
    return run


def assemble(
    config: TrainConfig, processes: Processes, run: Run, live: LiveTargets | None = None
) -> Trainer:
    """Open and check everything, write the run's config.json, and return its trainer.

    Raises:
        InputError, MismatchError: as `train`, also where the cache keeps documents apart and the
            student does not; nothing was written.
    """
    kept: dict[str, Any] = {
        "shard_cache": config.shard_cache,
        "shard_cache_size": config.shard_cache_size,
    }
    cache = open_cache(config.cache, **kept)
    check_targets(config.loss, config.temperature, cache.spec)
    loaded = load_student(
        config.student, cache, config.seed, trust_remote_code=config.trust_remote_code
    )
    if cache.spec.packing == "documents":
        require_isolation(loaded.model)
    pairs = open_pairs(config.cache, **kept) if config.pairs != "none" else None
    found = provenance(cache, loaded.model, loaded.hash)
    if pairs is not None:
        found["pairs"] = pair_identity(pairs)
    known = run.compare(config, found)["known_rows"]
    check_steps(run, config)
    rows = known_rows(cache, known)
    domains = chosen_domains(sorted(rows), config.domains, config.weights)
    weights, meter = make_weights(config, domains), make_meter(config, cache, rows, processes)
    student = prepare(loaded, config, processes)
    trainer = Trainer(
        config=config,
        processes=processes,
        cache=cache,
        run=run,
        loaded=loaded,
        student=student,
        objective=make_objective(student, config, cache, processes.device),
        optimizer=optimizer(student, config),
        loader=make_loader(config, cache, {name: rows[name] for name in domains}, processes),
        meter=meter,
        weights=weights,
        identity=identity(cache, config.student),
        live=live,
        pairs=None if pairs is None else make_pairs(config, pairs, weights.domains, processes),
    )
    if processes.main:
        run.open(config, found)
    processes.open_trackers(config)
    return trainer


def make_weights(config: TrainConfig, domains: Sequence[str]) -> DomainWeights:
    """Return the sampling weights of the domains in training."""
    return DomainWeights(
        config.weighting,
        domains,
        alpha=config.alpha,
        given=parse_weights(config.weights),
        rho=config.rho,
        window=config.window,
        shrink=config.shrink,
        tilt=config.tilt,
        repetition_guard=config.repetition_guard,
    )


def make_meter(config: TrainConfig, cache: Cache, rows: Known, processes: Processes) -> GapMeter:
    """Return what measures the gaps of all domains on held-out rows."""
    return GapMeter(
        cache,
        rows,
        config.eval_rows,
        config.micro,
        processes.device,
        share=processes.share,
        total=processes.total,
        window=config.window,
    )


def check_steps(run: Run, config: TrainConfig) -> None:
    """Check that a resumed run with another number of steps is still the run of its settings.

    The learning rate depends on the number of steps. It may change where the rates of the steps
    already taken stay what they were: before the decay of `wsd`, or at a constant rate.

    Raises:
        MismatchError: the rates would have been others, or the run is past the new last step.
    """
    saved = run.checkpoints()
    was = run.config["settings"].get("steps") if saved else config.steps
    if was == config.steps:
        return
    reached = saved[-1][0]
    before = replace(config, steps=was)
    same = all(learning_rate(config, n) == learning_rate(before, n) for n in range(reached))
    if reached > config.steps or not same:
        why = (
            f"it is at step {reached} already"
            if reached > config.steps
            else f"its learning rate up to step {reached} was that of a run of {was} steps"
        )
        raise MismatchError(
            f"{run.path} was started with --steps {was}, this call asks for {config.steps}, and "
            f"{why}. Use another run directory, or --steps {was}."
        )


def prepare(loaded: Student, config: TrainConfig, processes: Processes) -> Any:
    """Return the model of a student on its device, ready to be trained, with an adapter if asked.

    Raises:
        InputError: an adapter was asked for a fresh student, or peft is missing.
    """
    model = loaded.model
    if config.lora_rank:
        if Path(config.student).suffix == ".json":
            raise InputError(
                "--lora-rank is for a trained student; a fresh one has nothing to freeze."
            )
        model = add_adapter(model, config.lora_rank)
    if config.gradient_checkpointing:
        # newer versions of transformers have renamed the method
        old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
        getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
    if processes.rank:  # each process draws its own random numbers, for dropout
        torch.manual_seed(config.seed + processes.rank)
    return model.to(processes.device).train()


def make_objective(
    student: Any, config: TrainConfig, cache: Cache, device: torch.device
) -> Objective:
    """Return the loss of a student, compiled if asked."""
    cuda = device.type == "cuda"
    bf16 = {"bf16": True, "fp32": False, "auto": cuda and torch.cuda.is_bf16_supported()}
    loss = divergence(config.loss)
    terms = Terms(config.gamma, loss, config.temperature, config.compile and cuda)
    objective = Objective(student, terms, cache.spec.vocab_size, bf16[config.precision])
    if config.compile:
        objective.compile_body()
    return objective


def make_loader(config: TrainConfig, cache: Cache, rows: Known, processes: Processes) -> Loader:
    """Return the batches of a run, over the rows that it knows."""
    mixture = Mixture(
        {name: rows[name][TRAIN] for name in sorted(rows)},
        chunk_rows=cache.spec.chunk_rows,
        rows=config.own_rows,
        seed=config.seed,
    )
    return Loader(
        cache,
        mixture,
        processes.device,
        share=processes.share,
        temperature=config.temperature,
    )


def make_pairs(
    config: TrainConfig, pairs: Cache, domains: Sequence[str], processes: Processes
) -> PairLearner:
    """Return what learns from the pairs of a cache."""
    return PairLearner(
        pairs,
        domains,
        processes,
        PairTerms(config.pairs, config.beta, config.margin, config.per_token),
        count=config.pair_rows // 2,
        held_out=config.eval_rows,
        micro=max(1, config.micro // 2),
        seed=config.seed,
    )
