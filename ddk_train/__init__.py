"""Spend the cache many times: train students whose domain weights follow their gaps."""

from typing import TYPE_CHECKING, Any

from ddk_train.config import TrainConfig

if TYPE_CHECKING:
    from ddk_train.trainer import train

__all__ = ["TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from ddk_train.trainer import train

        return train
    if name == "__version__":
        from importlib.metadata import version

        return version("ddk-distill")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
