"""Students cut from teachers: loaded again, they compute what the kept layers compute by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_cache import InputError, atomic
from ddk_cache.testing import VOCAB
from ddk_train import cut_student
from ddk_train.student.cut import NOTE, evenly_spaced
from tests.helpers import SIZES, command, finish, random_model, tree

SLIDING = {"sliding_window": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": SLIDING | {"use_sliding_window": True, "max_window_layers": 3},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gpt2": {"n_inner": 32},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
}


def make(kind: str, path: Path, tokenizer: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Save a random model with its tokenizer, and return it."""
    model = random_model(kind, num_hidden_layers=6, **MODELS.get(kind, {})).to(dtype).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def read(path: Path, **options: Any) -> Any:
    """Load a model as anybody would, and check that nothing was made up."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model.eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """Return the (B, S, V) logits on rows that are longer than the sliding windows."""
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def layers_of(model: Any) -> torch.nn.ModuleList:
    """Return the decoder layers of one of `MODELS`."""
    base = model.base_model
    found: torch.nn.ModuleList = base.h if hasattr(base, "h") else base.layers
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_a_student_computes_what_the_kept_layers_compute(
    kind: str, tmp_path: Path, tokenizer: Any
) -> None:
    teacher = make(kind, tmp_path / "teacher", tokenizer)
    kept = [0, 3, 4]
    student = read(cut_student(tmp_path / "teacher", tmp_path / "student", layers=kept))
    # By hand: a dropped layer returns its input, and everything else stays in its place.
    for number, layer in enumerate(layers_of(teacher)):
        if number not in kept:
            layer.forward = lambda hidden_BSH, *_, **__: hidden_BSH
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_configuration_and_layer_numbers_are_those_of_a_smaller_model(
    kind: str, tmp_path: Path, tokenizer: Any
) -> None:
    teacher = make(kind, tmp_path / "teacher", tokenizer)
    student = read(cut_student(tmp_path / "teacher", tmp_path / "student", layers=[1, 5]))
    assert student.config.num_hidden_layers == len(layers_of(student)) == 2
    for name in ("layer_types", "no_rope_layers"):
        whole = getattr(teacher.config, name, None)
        assert getattr(student.config, name, None) == (whole and [whole[1], whole[5]])
    found = (vars(module) for module in layers_of(student).modules())
    numbers = {settings["layer_idx"] for settings in found if "layer_idx" in settings}
    assert numbers == {0, 1}
    assert student.config.tie_word_embeddings == teacher.config.tie_word_embeddings
    tied = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    assert tied == teacher.config.tie_word_embeddings


@torch.inference_mode()
def test_a_student_generates_as_without_its_cache_of_keys(tmp_path: Path, tokenizer: Any) -> None:
    make("gemma2", tmp_path / "teacher", tokenizer)
    student = read(cut_student(tmp_path / "teacher", tmp_path / "student", layers=[1, 2, 4]))
    tokens = torch.randint(1, VOCAB, (1, 7), generator=torch.Generator().manual_seed(2))
    cached, plain = (
        student.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


def test_dtype_tokenizer_and_note_are_kept(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    make("llama", tmp_path / "teacher", tokenizer, torch.bfloat16)
    out = cut_student(tmp_path / "teacher", tmp_path / "student", keep=3)
    assert {weight.dtype for weight in read(out, dtype="auto").parameters()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    assert json.loads((out / NOTE).read_bytes()) == {
        "teacher": str(tmp_path / "teacher"), "teacher_layers": 6, "layers": [0, 2, 5],
    }  # fmt: skip


def test_layers_are_evenly_spaced_with_both_ends() -> None:
    assert evenly_spaced(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert evenly_spaced(6, 6) == [0, 1, 2, 3, 4, 5]
    assert evenly_spaced(6, 1) == [0]
    for count in range(1, 40):
        for keep in range(2, count + 1):
            kept = evenly_spaced(count, keep)
            assert kept == sorted(set(kept))
            assert (len(kept), kept[0], kept[-1]) == (keep, 0, count - 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": [0, 6]}, "got 0, 6, expected numbers from 0 to 5 in ascending order"),
        ({"layers": [-1, 2]}, "got -1, 2"),
        ({"layers": [2, 1]}, "got 2, 1"),
        ({"layers": [1, 1]}, "got 1, 1"),
        ({"layers": []}, "got none"),
        ({"keep": 0}, "keep: got 0, expected 1 to 6"),
        ({"keep": 7}, "keep: got 7"),
        ({}, "both or none of layers and keep"),
        ({"keep": 2, "layers": [0]}, "both or none of layers and keep"),
    ],
)
def test_wrong_layers_are_refused_and_nothing_is_written(
    change: dict[str, Any], said: str, tmp_path: Path, tokenizer: Any
) -> None:
    make("llama", tmp_path / "teacher", tokenizer)
    with pytest.raises(InputError, match=said):
        cut_student(tmp_path / "teacher", tmp_path / "student", **change)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_what_exists_is_never_replaced(tmp_path: Path, tokenizer: Any) -> None:
    make("llama", tmp_path / "teacher", tokenizer)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="exists already"):
        cut_student(tmp_path / "teacher", tmp_path / "teacher", keep=2)
    assert tree(tmp_path) == before


def test_a_failure_while_writing_leaves_no_student(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(top: Path) -> None:
        raise OSError("No space left on device")

    make("llama", tmp_path / "teacher", tokenizer)
    monkeypatch.setattr(atomic, "sync_tree", full)
    with pytest.raises(OSError, match="No space left"):
        cut_student(tmp_path / "teacher", tmp_path / "student", keep=2)
    assert not (tmp_path / "student").exists()
    monkeypatch.undo()
    read(cut_student(tmp_path / "teacher", tmp_path / "student", keep=2))


def test_other_models_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

    for kind, auto, said in (
        ("bert", AutoModelForMaskedLM, "got a BertForMaskedLM, expected a causal language model"),
        ("llama", AutoModel, "lacks weights of its model: lm_head"),
        ("t5", AutoModel, "no teacher could be loaded"),
    ):
        path = tmp_path / kind
        auto.from_config(AutoConfig.for_model(kind, **SIZES)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        with pytest.raises(InputError, match=said):
            cut_student(path, tmp_path / "student", keep=2)


def test_a_teacher_that_lacks_a_tensor_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    from safetensors.torch import load_file, save_file

    make("llama", tmp_path / "teacher", tokenizer)
    file = tmp_path / "teacher" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(
        InputError, match=r"lacks weights of its model: model\.layers\.2\.mlp\.up_proj"
    ):
        cut_student(tmp_path / "teacher", tmp_path / "student", keep=2)


def test_layers_that_depend_on_their_place_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    # The first three layers of this one are dense, all later ones mixtures of experts.
    make("deepseek_v3", tmp_path / "teacher", tokenizer)
    with pytest.raises(InputError, match="layer 3 of the teacher would be another kind of layer"):
        cut_student(tmp_path / "teacher", tmp_path / "student", layers=[0, 3, 5])


def test_code_of_a_model_is_not_run(tmp_path: Path, tokenizer: Any) -> None:
    make("llama", tmp_path / "teacher", tokenizer)
    file = tmp_path / "teacher" / "config.json"
    theirs = {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}
    file.write_text(json.dumps(json.loads(file.read_bytes()) | theirs))
    (tmp_path / "teacher" / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(InputError, match="no teacher could be loaded"):
        cut_student(tmp_path / "teacher", tmp_path / "student", keep=2)


def test_on_the_command_line(tmp_path: Path, tokenizer: Any) -> None:
    make("llama", tmp_path / "teacher", tokenizer)
    words = ["ddk-train", "cut", tmp_path / "teacher", tmp_path / "student", "--layers", "0,5"]
    code, _, err = finish(command(*words))
    assert (code, read(tmp_path / "student").config.num_hidden_layers) == (0, 2), err
    code, _, err = finish(command(*words))
    assert code == 2
    assert err.startswith("Error: ")
    assert "exists already" in err
    code, _, err = finish(command(*words[:3], tmp_path / "other", "--layers", "0,x"))
    assert (code, err) == (2, "Error: layers: got '0,x', expected numbers such as 0,3,6.\n")
