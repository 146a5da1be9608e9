"""Spend the cache many times: train students whose domain weights follow their gaps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddk_train.config import TrainConfig
    from ddk_train.cut import cut_student
    from ddk_train.job import train
    from ddk_train.weights import DomainWeights, Gaps

__all__ = ["DomainWeights", "Gaps", "TrainConfig", "cut_student", "train"]

_HOMES = {
    "DomainWeights": "weights",
    "Gaps": "weights",
    "TrainConfig": "config",
    "cut_student": "cut",
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
