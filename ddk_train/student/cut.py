"""A student cut from its teacher: some of its decoder layers, everything else unchanged.

Such a student has the teacher's tokenizer, embeddings and head, and learns in a few hundred steps
what a fresh one needs millions of tokens for. It can be no wider and no narrower than the teacher.

The configuration is cut first (number of layers, and every list with an entry per layer), the
architecture's own code makes the smaller model from it, and the kept weights are loaded under their
new numbers. So layer indices, masks and caches are what that code makes of them. The price is a
check: where a layer would be another kind of layer at its new place (Mixture-of-Experts models with
dense first layers, position-dependent scales), the cut is refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddk_cache import InputError, atomic
from ddk_cache.hf import load_model, load_tokenizer

NOTE = "cut.json"
"""The file of a cut student that says from which teacher it was cut, and where."""


def cut_student(
    teacher: str | Path,
    out: str | Path,
    *,
    layers: Sequence[int] | None = None,
    keep: int | None = None,
) -> Path:
    """Save a student that has some of a teacher's decoder layers; return its directory, `out`.

    It is an ordinary model directory with its tokenizer, of the teacher's dtype, written whole or
    not at all. Code that comes with a model is never run.

    Args:
        teacher: Model directory or hub id of a causal language model.
        out: A path at which there is nothing yet.
        layers: The layers to keep, counted from 0, in ascending order.
        keep: Instead of `layers`: how many to keep, evenly spaced from the first to the last.

    Raises:
        InputError: `out` exists, the teacher is not a complete causal language model, or it has no
            such layers, or they do not work at their new places.
    """
    out = Path(out)
    if (layers is None) == (keep is None):
        raise InputError("cut: got both or none of layers and keep, expected one. Give either.")
    if out.exists():
        raise InputError(f"{out}: exists already. Give another path, or remove it.")
    model = load_whole(teacher)
    tokenizer = load_tokenizer(teacher)
    stack = find_layers(model)
    count = len(model.get_submodule(stack))
    kept = evenly_spaced(count, keep) if keep is not None else list(layers or ())
    check_layers(kept, count)
    student = cut_model(model, stack, kept)
    note = {"teacher": str(teacher), "teacher_layers": count, "layers": kept}
    with atomic.whole(out) as partial:
        student.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / NOTE).write_text(json.dumps(note) + "\n")
    return out


def parse_layers(text: str) -> list[int]:
    """Read the numbers of layers, joined by commas. Raises InputError where one is not a number."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"layers: got {text!r}, expected numbers such as 0,3,6.") from None


def load_whole(teacher: str | Path) -> Any:
    """Load a causal language model in its own dtype.

    Raises:
        InputError: it is another kind of model, or weights are missing.
    """
    model = load_model("teacher", teacher, dtype="auto")
    kind, saved = type(model).__name__, model.config.architectures or []
    if saved and kind not in saved:
        raise InputError(
            f"the teacher {str(teacher)!r}: got a {saved[0]}, expected a causal language model. "
            f"Give a directory of a {kind}."
        )
    return model.eval()


def find_layers(model: Any) -> str:
    """Return the name of the list of decoder layers in a model.

    Raises:
        InputError: there is no such list.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    for module in decoder.modules():  # outer modules first, so a list of experts comes later
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            names = (str(name) for name, found in model.named_modules() if found is module)
            return next(names)
    raise InputError(
        f"{type(model).__name__}: found no list of its {count} decoder layers. Cut it by hand."
    )


def evenly_spaced(count: int, keep: int) -> list[int]:
    """Return `keep` of `count` layers, the first and the last among them (for one: the first).

    Raises:
        InputError: there are fewer layers, or none is kept.
    """
    if not 1 <= keep <= count:
        raise InputError(f"keep: got {keep}, expected 1 to {count}, the layers of the teacher.")
    return [round(n * (count - 1) / max(keep - 1, 1)) for n in range(keep)]


def check_layers(kept: Sequence[int], count: int) -> None:
    """Raise InputError where layers are out of range, repeated or not in ascending order."""
    if not kept or list(kept) != sorted({n for n in kept if 0 <= n < count}):
        raise InputError(
            f"layers: got {', '.join(map(str, kept)) or 'none'}, expected numbers from 0 to "
            f"{count - 1} in ascending order, each once."
        )


def cut_model(model: Any, stack: str, kept: Sequence[int]) -> Any:
    """Return a model of the same class with only those layers of the list named `stack`.

    It shares the weights of `model`, and its other buffers are not filled: it is for saving.

    Raises:
        InputError: the architecture makes other layers at the new places.
    """
    with torch.device("meta"):
        student = type(model)(cut_config(model.config, kept)).eval()
    check_same_kind(model.get_submodule(stack), student.get_submodule(stack), kept)
    places = {str(old): new for new, old in enumerate(kept)}
    weights = {}
    for name, weight in model.state_dict().items():
        if not name.startswith(f"{stack}."):
            weights[name] = weight
            continue
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if number in places:
            weights[f"{stack}.{places[number]}.{rest}"] = weight
    try:
        student.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # a tensor that depends on the number of layers
        raise InputError(f"{type(model).__name__} cannot be cut there: {error}") from error
    student.tie_weights()
    student.generation_config = model.generation_config
    return student


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """Return the configuration of a model of only those layers.

    Every list with an entry per layer is cut as well (`layer_types`, `no_rope_layers`, …).

    Raises:
        InputError: the configuration's own checks refuse the result.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    count = text.num_hidden_layers
    for name, value in vars(text).items():
        per_layer = isinstance(value, list | tuple) and len(value) == count
        if per_layer and not name.endswith("_token_id") and name != "architectures":
            setattr(text, name, [value[n] for n in kept])
    text.num_hidden_layers = len(kept)
    try:
        return type(config).from_dict(config.to_dict())  # as it will be loaded
    except Exception as error:  # transformers raises many kinds
        raise InputError(
            f"the configuration ({config.model_type}) cannot have layers "
            f"{', '.join(map(str, kept))} alone: {error}"
        ) from error


def check_same_kind(old: Any, new: Any, kept: Sequence[int]) -> None:
    """Raise InputError where a kept layer would be another kind of layer at its new place."""
    for place, number in enumerate(kept):
        if traits(old[number]) != traits(new[place]):
            raise InputError(
                f"layer {number} of the teacher would be another kind of layer at place {place}: "
                "its architecture makes layers by their place. Keep other layers."
            )


def traits(layer: torch.nn.Module) -> list[Any]:
    """Return what a layer consists of, and every plain setting in it but its number."""
    plain = (bool, int, float, str)
    return [repr(layer)] + [
        {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, plain) and not name.startswith("_") and name != "layer_idx"
        }
        for module in layer.modules()
    ]
