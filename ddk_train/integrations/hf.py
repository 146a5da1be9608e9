"""Distillation in the trainers of transformers and TRL.

    trainer = DistillationTrainer(model, args, train_dataset=CacheDataset("mix.zarr", rows=8))

    class DistillationSFT(DistillationMixin, SFTTrainer): ...

The mixin replaces two things: where batches come from, and the loss. The dataset makes whole
batches and shares them among ranks, so `per_device_train_batch_size` has no meaning here, and the
DataLoader is not passed to accelerate, which would share the rows a second time.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from ddk_cache import InputError, atomic
from ddk_train.data.dataset import CacheDataset, Weights
from ddk_train.evaluate import GapMeter, Measured, gap_meter, measure_with
from ddk_train.loss.objective import distillation_loss
from ddk_train.weights.gaps import Settings
from ddk_train.weights.moving import DomainWeights

STATE = "ddk_data.pt"
"""The file of a checkpoint with the position in the data and the state of the weights."""


class DistillationMixin:
    """A Trainer whose data are a `CacheDataset`, and whose loss is `distillation_loss`.

    Give `max_steps`, because the batches never end. A checkpoint keeps the position in the data,
    so that a resumed run reads the batches that the whole run would have read.
    """

    args: Any
    state: Any
    accelerator: Any
    callback_handler: Any

    def __init__(
        self,
        *args: Any,
        train_dataset: CacheDataset,
        eval_dataset: CacheDataset | None = None,
        gamma: float = 0.2,
        loss: str = "forward_kl",
        **settings: Any,
    ) -> None:
        """Set the trainer up: `gamma` is the weight of the divergence `loss` from the teacher.

        Raises:
            InputError: a dataset is not a CacheDataset.
        """
        for data in (train_dataset, eval_dataset):
            if not isinstance(data, CacheDataset | None):
                raise InputError(f"got a {type(data).__name__}, expected a CacheDataset.")
        self.gamma, self.loss = gamma, loss
        # SFTTrainer looks at its data and tokenizes them; this is as good as tokenized.
        stand_in = Dataset.from_list([{"input_ids": [0], "labels": [0]}])
        super().__init__(*args, train_dataset=stand_in, **settings)  # type: ignore[call-arg]
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.model_accepts_loss_kwargs = True  # the loss is divided by all counted positions

    def get_train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """Return the batches of the training dataset."""
        return self._batches(self.train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[dict[str, torch.Tensor]]:
        """Return the batches of an evaluation dataset, which must end (`epochs=1`)."""
        return self._batches(eval_dataset or self.eval_dataset)

    def _batches(self, data: CacheDataset | None) -> DataLoader[dict[str, torch.Tensor]]:
        if not isinstance(data, CacheDataset):
            raise InputError(f"got a {type(data).__name__}, expected a CacheDataset.")
        workers = self.args.dataloader_num_workers
        return DataLoader(
            data,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def evaluate(self, eval_dataset: Any = None, *args: Any, **settings: Any) -> Any:
        """Evaluate as the Trainer does, without SFTTrainer's preparation of text."""
        return Trainer.evaluate(self, eval_dataset, *args, **settings)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the distillation loss, divided by the counted positions of the whole step."""
        loss = distillation_loss(
            model,
            inputs,
            gamma=self.gamma,
            loss=self.loss,
            temperature=self.train_dataset.temperature,
            positions=num_items_in_batch,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients
        return (loss, {}) if return_outputs else loss

    # --- checkpoints ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self.args.should_save:
            path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            consumed = self.state.global_step * self.args.gradient_accumulation_steps
            state = {
                "data": self.train_dataset.state_dict(consumed),
                "weights": [c.state_dict() for c in self._gap_callbacks()],
            }
            written = io.BytesIO()
            torch.save(state, written)
            atomic.replace(path / STATE, written.getvalue())

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(checkpoint, model)  # type: ignore[misc]
        path = Path(checkpoint) / STATE
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.train_dataset.load_state_dict(state["data"])
            for callback, saved in zip(self._gap_callbacks(), state["weights"], strict=True):
                callback.load_state_dict(saved)
            self.args.ignore_data_skip = True  # the dataset is in its place already

    def _gap_callbacks(self) -> list[GapCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, GapCallback)]


class DistillationTrainer(DistillationMixin, Trainer):  # type: ignore[misc]
    """The Trainer of transformers on a cache."""


class MovingWeights(Protocol):
    """What moves the weights: `ddk_train.DomainWeights`, or anything like it."""

    def update(self, gaps: Measured) -> Weights:
        """Return new sampling weights for a measurement."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""


class GapCallback(TrainerCallback):  # type: ignore[misc]
    """Measure the gaps every `interval` steps, and move the weights of the training dataset.

    With DataLoader workers, new weights hold from the first batch that no worker has been asked
    for. Gaps and weights are in the trainer's log history.
    """

    def __init__(
        self,
        weights: MovingWeights,
        *,
        interval: int = 1000,
        rows: int = 500,
        batch_rows: int = 8,
    ) -> None:
        """Measure on at most `rows` held-out rows per domain, `batch_rows` at a time."""
        self.weights, self.interval = weights, interval
        self.rows, self.batch_rows = rows, batch_rows
        self._meter: GapMeter | None = None
        self._losses: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the weights, and the losses that falls are measured from."""
        losses = self._meter.state_dict() if self._meter else self._losses
        return {"weights": self.weights.state_dict(), "losses": losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.weights.load_state_dict(state["weights"])
        self._losses = state["losses"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure before the first step."""
        if state.global_step == 0:
            self._move(state, given["model"], given["train_dataloader"].dataset, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure where an interval ends."""
        if state.global_step % self.interval == 0:
            loader = given["train_dataloader"]
            ahead = loader.num_workers * (loader.prefetch_factor or 0)
            consumed = state.global_step * args.gradient_accumulation_steps
            self._move(state, given["model"], loader.dataset, consumed, ahead)

    def _move(
        self, state: Any, model: Any, dataset: CacheDataset, consumed: int, ahead: int = 0
    ) -> None:
        """Measure after so many batches; new weights hold from `ahead` batches later."""
        if self._meter is None:
            moving = self.weights
            window = (moving.settings if isinstance(moving, DomainWeights) else Settings()).window
            self._meter = gap_meter(model, dataset.cache, self.rows, self.batch_rows, window)
            self._meter.load_state_dict(self._losses)
        found, drawn = measure_with(self._meter, model), dataset.drawn(consumed)
        seen = np.array([drawn.get(name, 0) for name in found.domains], np.float64)
        found = replace(found, rows_seen=seen, epochs=seen / np.maximum(found.sizes, 1))
        dataset.set_weights(self.weights.update(found), at=consumed + ahead)
        line: dict[str, float] = {"step": state.global_step}
        for n, name in enumerate(found.domains):
            line[f"gap/{name}"] = float(found.excess[n])
            line[f"kl/{name}"] = float(found.kl[n])
            line[f"weight/{name}"] = dataset.weights[name]
        state.log_history.append(line)
