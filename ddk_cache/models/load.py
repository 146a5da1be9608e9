"""A causal language model of transformers → a teacher.

Every way of placing the weights ends in one model with one forward call: on one device, spread by
accelerate over GPUs, CPU and disk, quantized, or in parts among several processes. A model whose
weights somebody else has placed is never moved. The identity is the content of the weights
wherever they are, so the way of placing them is no part of it: caches of one model agree to
rounding, and one begun on one layout can be resumed or verified on another.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ddk_cache.build.teacher import Teacher
from ddk_cache.errors import InputError
from ddk_cache.hashing import canonical, digest
from ddk_cache.hf import hash_weights, load, load_model, locate, pick_device
from ddk_cache.models.body import BodyTeacher, take_apart
from ddk_cache.models.config import QUANTIZATIONS, TeacherConfig
from ddk_cache.models.parallel import in_parallel, require_world

log = logging.getLogger(__name__)

DECIDED = {"device_mesh", "distributed_config", "gguf_file", "output_loading_info", "tp_plan"}
"""Further arguments of `from_pretrained` that options decide, also where they are not given."""

CAUSAL_TOKENS = 8
"""Tokens on which a model is tried for looking ahead."""


def load_teacher(
    name: str | Path,
    config: TeacherConfig = TeacherConfig(),  # noqa: B008 (it is frozen)
    **changes: Any,
) -> Teacher:
    """Load a causal language model from a directory, a GGUF file or the hub.

    `changes` are fields of the config. With `tensor_parallel`, every process of torchrun calls
    this, and only the first may do a job with the teacher: see `Teacher.in_step`.

    Raises:
        InputError: there is no such model, dtype or device, weights are missing, an option does
            not fit the model or this machine, or the model looks ahead.
    """
    config = TeacherConfig(**vars(config) | changes)
    model, device, quantization = load_placed(name, config)
    teacher = teacher_of(model, str(name), device, quantization)
    check_causal(teacher)
    return in_parallel(teacher) if config.tensor_parallel > 1 else teacher


def load_placed(name: str | Path, config: TeacherConfig) -> tuple[Any, torch.device, str | None]:
    """Return a model where the options place it, the device of its tokens, and its quantization.

    Raises:
        InputError: as `load_teacher`.
    """
    target = pick_device(config.device)
    options = model_options(name, config, target)
    check_checkpoint(name, config, options)
    place, gguf = locate(name)
    model = load_model("teacher", place, **options, **gguf)
    model.eval().requires_grad_(False)
    if "device_map" in options or "distributed_config" in options:
        target = input_device(model)
    else:
        model.to(target)
    return (
        model,
        target,
        config.quantization or ("own" if "quantization_config" in options else None),
    )


def model_options(name: str | Path, config: TeacherConfig, device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained`.

    Raises:
        InputError: `model_kwargs` holds something that an option decides.
    """
    auto = config.dtype == "auto"
    options: dict[str, Any] = {
        "dtype": "float32" if auto and device.type == "cpu" else config.dtype,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.revision:
        options["revision"] = config.revision
    if config.attention:
        options["attn_implementation"] = config.attention
    if config.device_map:
        options["device_map"] = config.device_map
    if config.offload_folder:
        options["offload_folder"] = config.offload_folder
    if config.quantization:
        options["quantization_config"] = QUANTIZATIONS[config.quantization]
    if config.tensor_parallel > 1:
        require_world(config.tensor_parallel)
        options["distributed_config"] = {"tp_size": config.tensor_parallel}
    further = config.further()
    if twice := sorted((options.keys() | DECIDED) & further.keys()):
        raise InputError(
            f"model_kwargs: {', '.join(twice)} is decided by an option of its own. Give it there."
        )
    options |= further
    if "quantization_config" in options:  # its weights are quantized where they will be
        options.setdefault("device_map", {"": str(device)})
    return options


def check_checkpoint(name: str | Path, config: TeacherConfig, options: dict[str, Any]) -> None:
    """Raise InputError where an option does not fit the checkpoint."""
    known = {key: options[key] for key in ("trust_remote_code", "revision") if key in options}
    if config.revision and Path(name).expanduser().exists():
        raise InputError(f"--revision is for a model of the hub, and {name} is on this machine.")
    place, gguf = locate(name)
    found = load("teacher", "AutoConfig", place, **known, **gguf)
    if "quantization_config" in options and (gguf or getattr(found, "quantization_config", None)):
        raise InputError(
            f"the teacher {str(name)!r} is quantized already. Leave out --quantization."
        )
    text = found.get_text_config()
    counts = (getattr(text, f"num_{kind}_heads", None) for kind in ("key_value", "attention"))
    heads = next((count for count in counts if count), 0)
    if heads % config.tensor_parallel:
        raise InputError(
            f"tensor_parallel: got {config.tensor_parallel}, expected a divisor of {heads}, the "
            f"key-value heads of the teacher {str(name)!r}."
        )


def input_device(model: Any) -> torch.device:
    """Return where the tokens of a model go whose weights are spread."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)  # a weight that is offloaded has no device
    place = getattr(hook, "execution_device", None)
    return torch.device(embedding.weight.device if place is None else place)


def teacher_of(model: Any, name: str, device: torch.device, quantization: str | None) -> Teacher:
    """Return a loaded model as a teacher, with its head apart where it is an ordinary one."""

    def logits(tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None = None) -> torch.Tensor:
        own = {} if positions_BS is None else {"position_ids": positions_BS}
        out: torch.Tensor = model(input_ids=tokens_BS, use_cache=False, **own).logits
        return out

    text = model.config.get_text_config()
    found: dict[str, Any] = {
        "logits": logits,
        "vocab_size": text.vocab_size,
        "identity": identify(model, quantization),
        "name": name,
        "device": device,
        "positions": getattr(text, "max_position_embeddings", None),
        "takes_positions": True,
    }
    parts = take_apart(model, device)
    if isinstance(parts, str):
        log.warning("all logits of a batch will be in memory at once, which takes more: %s", parts)
        return Teacher(**found)
    return BodyTeacher(**found, body=parts.body, head=parts.head, position_floats=parts.floats)


@torch.inference_mode()
def check_causal(teacher: Teacher) -> None:
    """Raise InputError where a later token changes the logits before it, as in an encoder."""
    count = min(CAUSAL_TOKENS, teacher.positions or CAUSAL_TOKENS)
    one = torch.arange(count, device=teacher.device)[None] % teacher.vocab_size
    other = one.clone()
    other[0, -1] = (count + 1) % teacher.vocab_size
    before, after = (teacher.logits(tokens)[:, :-1] for tokens in (one, other))
    rounding = 4 * torch.finfo(before.dtype).eps * before.abs().amax()
    if ((after - before).abs() > rounding).any():
        raise InputError(
            f"teacher {teacher.name!r}: its logits depend on later tokens, expected a causal "
            "language model. Give a decoder, not an encoder."
        )


def identify(model: torch.nn.Module, quantization: str | None = None) -> dict[str, str]:
    """Return the class, dtype and content hashes (configuration, weights) of a model.

    `quantization` is what was done to the weights of the checkpoint. Neither attention nor devices
    are part of it.
    """
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    if "quantization_config" in config:
        config["quantization_config"].pop("gguf_file", None)
    identity = {
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "config": digest(canonical(config)),
        "weights": hash_weights(model),
    }
    return identity | ({"quantization": quantization} if quantization else {})
