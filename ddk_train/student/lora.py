"""LoRA through peft: train a few small matrices, with the student's own weights frozen.

A rank-r product is added to every linear layer of the body and trained. Head and embedding stay as
they are, so that the head is still fused with its loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk_cache import InputError


def add_adapter(student: Any, rank: int) -> Any:
    """Return the student with a new adapter of this rank and its own weights frozen.

    Raises:
        InputError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError(
            "--lora-rank needs peft, which is not installed. Install it with "
            "pip install 'ddk-distill[lora]', or leave out the option."
        ) from None
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(student, config)


def is_adapted(student: Any) -> bool:
    """Return whether a student has an adapter."""
    return hasattr(student, "merge_and_unload")


def load_adapter(student: Any, path: Path) -> None:
    """Load the adapter's weights that `save_pretrained` wrote into a directory."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(student, load_peft_weights(str(path), device="cpu"))
