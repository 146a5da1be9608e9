"""How a teacher is loaded and run: every option, its reason and its check.

One flat dataclass, from which the command lines make their options. What has no option of its own
(limits of memory, another quantization) is given to transformers in `model_kwargs`. Combinations
that cannot work are refused here, before anything heavy is imported; what depends on the
checkpoint is refused when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddk_cache.errors import InputError, unknown

DTYPES = ("auto", "float32", "bfloat16", "float16")

ATTENTIONS = ("eager", "flash_attention_2", "flash_attention_3", "flex_attention", "sdpa")

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def _torchao(name: str) -> dict[str, Any]:
    """Return a quantization of torchao as transformers reads it."""
    config = {"_type": name, "_version": 2, "_data": {}}
    return {"quant_method": "torchao", "quant_type": {"default": config}}


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "bnb-int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "bnb-nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    },
    "torchao-int8": _torchao("Int8WeightOnlyConfig"),
    "torchao-float8": _torchao("Float8WeightOnlyConfig"),
}
"""Name → `quantization_config` of transformers."""

CHOICES = {
    "dtype": DTYPES,
    "attention": ATTENTIONS,
    "device_map": DEVICE_MAPS,
    "quantization": tuple(QUANTIZATIONS),
}
"""Option → its words."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """How a teacher is loaded and run. Every option has a default.

    Raises:
        InputError: an option is unknown, or two of them exclude each other.
    """

    dtype: str = "auto"
    """Floating-point type of the teacher; auto is the checkpoint's own, on a CPU float32."""
    device: str = "auto"
    """Device of the teacher: auto, cpu, cuda, cuda:1, …"""
    trust_remote_code: bool = False
    """Run code that comes with the model or tokenizer."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    attention: str | None = None
    """Implementation of attention.  [default: as transformers chooses]"""
    device_map: str | None = None
    """Spread one teacher over all GPUs of this process, then the CPU, then the disk."""
    offload_folder: str | None = None
    """Directory for weights that `device_map` puts on the disk."""
    tensor_parallel: int = 1
    """Processes (of torchrun) that run one teacher together, each with a part of every layer."""
    quantization: str | None = None
    """Quantize the weights when they are loaded."""
    model_kwargs: str | Mapping[str, Any] | None = None
    """YAML file of further keyword arguments of transformers' from_pretrained."""

    def __post_init__(self) -> None:
        for name, words in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in words:
                raise InputError(unknown(name.replace("_", " "), str(value), words))
        if type(self.tensor_parallel) is not int or self.tensor_parallel < 1:
            raise InputError(
                f"tensor_parallel: got {self.tensor_parallel!r}, expected a whole number from 1."
            )
        placed = {
            "--device": self.device != "auto",
            "--device-map": self.device_map is not None,
            "--tensor-parallel": self.tensor_parallel > 1,
        }
        if len(given := [option for option, is_given in placed.items() if is_given]) > 1:
            raise InputError(
                f"{' and '.join(given)}: each decides where the teacher is. Give one of them."
            )
        if self.quantization and self.tensor_parallel > 1:
            raise InputError(
                "--quantization and --tensor-parallel: a teacher is not quantized in parts. Give "
                "a checkpoint that is quantized already, or one of the options."
            )
        if self.offload_folder and not self.device_map:
            raise InputError("--offload-folder is for --device-map. Give both, or neither.")

    def further(self) -> dict[str, Any]:
        """Return `model_kwargs`, read from its file.

        Raises:
            InputError: the file cannot be read, or is not a mapping.
        """
        if not isinstance(self.model_kwargs, str):
            return dict(self.model_kwargs or {})
        import yaml

        try:
            read = yaml.safe_load(Path(self.model_kwargs).expanduser().read_text())
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self.model_kwargs} is not readable YAML: {reason}.") from error
        if not isinstance(read, dict) or not all(isinstance(name, str) for name in read):
            raise InputError(
                f"{self.model_kwargs}: got {read!r}, expected a mapping of argument to value."
            )
        return read
