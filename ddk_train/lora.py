"""LoRA through peft: train a few small matrices beside a frozen student.

What is trained is a rank-r product beside every linear layer of the body. The head and the
embedding stay as they are, so that the head is still fused with its loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk_cache import InputError


def add_adapter(student: Any, rank: int) -> Any:
    """Return the student with an adapter of this rank, its own weights frozen.

    Raises:
        InputError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError(
            "--lora-rank needs peft, which is not installed. Install it with "
            "pip install 'ddk[lora]', or leave the option away."
        ) from None
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(student, config)


def is_adapted(student: Any) -> bool:
    """Return whether a student carries an adapter."""
    return hasattr(student, "merge_and_unload")


def load_adapter(student: Any, path: Path) -> None:
    """Take the adapter's weights from a directory that `save_pretrained` wrote."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(student, load_peft_weights(str(path), device="cpu"))
