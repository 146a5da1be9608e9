"""Spend the cache many times: train students whose domain weights follow their gaps."""

from typing import TYPE_CHECKING, Any

from ddk_train.config import TrainConfig

if TYPE_CHECKING:
    from ddk_train.cut import cut_student
    from ddk_train.trainer import train

__all__ = ["TrainConfig", "cut_student", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from ddk_train.trainer import train

        return train
    if name == "cut_student":
        from ddk_train.cut import cut_student

        return cut_student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
