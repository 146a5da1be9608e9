"""Optimizers and learning rates by name.

Matrices decay, vectors (norms, biases) do not. The fused AdamW costs one kernel per step; with
8-bit states it needs a quarter of the memory for them, and bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from ddk_cache import InputError

if TYPE_CHECKING:
    from ddk_train.config import TrainConfig


def optimizer(student: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of those parameters of a student that are trained.

    Raises:
        InputError: a library that it needs is not installed.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return MAKERS[config.optimizer](groups, lr=config.lr, betas=(0.9, config.beta2))


def adamw(groups: Iterable[Any], **settings: Any) -> torch.optim.Optimizer:
    """Return PyTorch's fused AdamW."""
    return torch.optim.AdamW(groups, **settings, fused=True)


def adamw_8bit(groups: Iterable[Any], **settings: Any) -> torch.optim.Optimizer:
    """Return AdamW with 8-bit states."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError(
            "optimizer 'adamw_8bit' needs bitsandbytes, which is not installed. Install it with "
            "pip install bitsandbytes, or use --optimizer adamw."
        ) from None
    chosen: torch.optim.Optimizer = AdamW8bit(groups, **settings)
    return chosen


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    share = SHAPES[config.schedule](done, config.decay)
    return config.lr * (config.min_lr + (1 - config.min_lr) * share)


def decays(config: TrainConfig, step: int) -> bool:
    """Return whether the rate of a step, counted from 0, lies in the decay of schedule wsd."""
    risen = step >= config.warmup_steps
    return config.schedule == "wsd" and risen and learning_rate(config, step) < config.lr


def cosine(done: float, decay: float) -> float:
    """Fall along half a cosine over the whole run."""
    return 0.5 * (1 + math.cos(math.pi * done))


def stable_then_decay(done: float, decay: float) -> float:
    """Stay constant, then fall linearly over the last share `decay` (warmup-stable-decay)."""
    return min(1.0, (1 - done) / decay)


MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
}
SHAPES: dict[str, Callable[[float, float], float]] = {"cosine": cosine, "wsd": stable_then_decay}
"""(share of the run done, share that decays) → rate between its floor (0) and its peak (1)."""
