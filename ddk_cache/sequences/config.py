"""How responses are sampled: one flat dataclass, from which the commands make their options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ddk_cache.errors import InputError

WHOLE_NUMBERS = {"samples": (1, 2**16), "max_new_tokens": (1, 2**20), "batch": (1, 2**16),
                 "seed": (0, 2**63 - 1)}  # fmt: skip
"""Setting → its least and largest value."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a model answers prompts. Everything here decides the bytes of the answers.

    Raises:
        InputError: a setting is out of range or of the wrong type.
    """

    samples: int = 1
    """Responses to each prompt."""
    max_new_tokens: int = 256
    """Most tokens of a response."""
    temperature: float = 1.0
    """Temperature of sampling; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of sampling. A response is a function of seed, prompt and sample number."""
    batch: int = 32
    """Responses written at the same time; a process that is killed loses one batch."""

    def __post_init__(self) -> None:
        for name, (least, most) in WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise InputError(
                    f"{name}: got {value!r}, expected a whole number from {least} to {most:,}."
                )
        for name, low, high in (("temperature", 0, 100), ("top_p", 0, 1)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= high:
                raise InputError(f"{name}: got {value!r}, expected a number from {low} to {high}.")
        if self.top_p == 0:
            raise InputError("top_p: got 0, expected more. Give --temperature 0 for no sampling.")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)
