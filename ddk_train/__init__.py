"""Spend the cache many times: train students whose domain weights follow their gaps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddk_train.config import TrainConfig
    from ddk_train.data.dataset import CacheDataset
    from ddk_train.evaluate import measure_gaps
    from ddk_train.integrations.hf import DistillationMixin, DistillationTrainer, GapCallback
    from ddk_train.job import train
    from ddk_train.loss.objective import distillation_loss
    from ddk_train.student.cut import cut_student
    from ddk_train.weights.gaps import Gaps
    from ddk_train.weights.moving import DomainWeights

__all__ = [
    "CacheDataset",
    "DistillationMixin",
    "DistillationTrainer",
    "DomainWeights",
    "GapCallback",
    "Gaps",
    "TrainConfig",
    "cut_student",
    "distillation_loss",
    "measure_gaps",
    "train",
]

_HOMES = {
    "CacheDataset": "data.dataset",
    "DistillationMixin": "integrations.hf",
    "DistillationTrainer": "integrations.hf",
    "DomainWeights": "weights.moving",
    "GapCallback": "integrations.hf",
    "Gaps": "weights.gaps",
    "TrainConfig": "config",
    "cut_student": "student.cut",
    "distillation_loss": "loss.objective",
    "measure_gaps": "evaluate",
    "train": "job",
}
"""The module of each name; it is imported when the name is first used, and torch with some."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"ddk_train.{_HOMES[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("ddk-distill")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
