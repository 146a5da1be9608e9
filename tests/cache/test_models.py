"""Teachers of transformers: head apart or not, spread, quantized, as a GGUF file, and refusals."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_cache import InputError, TeacherConfig, load_teacher, load_tokenizer
from ddk_cache.build import targets as extraction
from ddk_cache.build.scoring import rows_that_fit
from ddk_cache.build.teacher import Call, Teacher
from ddk_cache.inspect.verify import replay
from ddk_cache.models.body import BodyTeacher
from ddk_cache.models.config import QUANTIZATIONS
from ddk_cache.testing import VOCAB
from tests.cache.gguf_file import write_gguf
from tests.helpers import HEADS, loud_model, make_spec

MODELS: dict[str, dict[str, Any]] = {
    **HEADS,
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 8},  # a projection between body and head
}


def save(name: str, path: Path, **changes: Any) -> Path:
    """Save a model with random weights."""
    loud_model(name, **MODELS.get(name, {}) | changes).save_pretrained(path)
    return path


def scores(teacher: Teacher, kind: str, rows: int = 5) -> tuple[extraction.Scores, Any]:
    """Return what a teacher says of some random rows."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(257, (rows, 17), generator=generator)
    offsets = torch.rand(rows, 16, dtype=torch.float64, generator=generator)
    spec = make_spec(targets=kind)
    with torch.inference_mode():
        return teacher.scores(Call(tokens, torch.arange(rows), spec.targets, (), offsets))


def same(one: extraction.Scores, other: extraction.Scores, error: float = 0.0) -> None:
    """Compare scores, whose ids may differ where two are as likely."""
    assert (one.ids == other.ids).float().mean() > 0.99
    torch.testing.assert_close(one.label_logprob, other.label_logprob, rtol=0, atol=error)


def off(one: Teacher, other: Teacher) -> float:
    """Return the mean difference of two teachers at the true tokens, in nats."""
    labels = [scores(teacher, "topk:8")[0].label_logprob for teacher in (one, other)]
    return float((labels[0] - labels[1]).abs().mean())


@pytest.mark.parametrize("kind", ["topk:8", "sampled:8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_head_apart_gives_the_targets_of_the_logits(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(save(name, tmp_path))
    assert isinstance(teacher, BodyTeacher)
    whole = Teacher(teacher.logits, VOCAB, {})
    monkeypatch.setattr(extraction, "HEAD_POSITIONS", 7)
    monkeypatch.setitem(extraction.HEAD_BYTES, "cpu", 0)
    got, at = scores(teacher, kind)
    expected, logits = scores(whole, kind)
    same(got, expected, 1e-5)
    torch.testing.assert_close(at, logits, rtol=0, atol=1e-5)


def test_the_head_never_sees_more_than_a_chunk(
    teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(teacher_dir)
    assert isinstance(teacher, BodyTeacher)
    seen: list[int] = []
    head = teacher.head

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return head(hidden)

    object.__setattr__(teacher, "head", watched)
    monkeypatch.setattr(extraction, "HEAD_POSITIONS", 30)
    monkeypatch.setitem(extraction.HEAD_BYTES, "cpu", 0)
    scores(teacher, "topk:8")
    assert seen == [30, 30, 20, 5]


def test_rows_of_a_call_follow_the_body_where_the_head_is_apart(teacher_dir: Path) -> None:
    teacher = load_teacher(teacher_dir)
    spec = make_spec(vocab_size=256_000, seq_len=4096, shard_rows=512)
    assert teacher.position_floats == 3 * 128 + 4 * 32
    assert rows_that_fit(teacher, spec) == 2**28 // (4 * 4096 * 512)


def test_an_unusual_head_takes_the_plain_path_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ddk_cache.head.FACTORS", {})
    caplog.set_level(logging.WARNING)
    teacher = load_teacher(save("cohere", tmp_path))
    assert type(teacher) is Teacher
    assert "changes its logits after its head in an unknown way" in caplog.text
    assert scores(teacher, "topk:8")[0].ids.shape == (5, 16, 8)


def test_weights_on_cpu_and_disk_give_the_same_teacher(
    teacher_dir: Path, tmp_path: Path, make_cache: Any
) -> None:
    plain = load_teacher(teacher_dir)
    (tmp_path / "more.yaml").write_text("max_memory: {cpu: 30KB}\n")
    spread = load_teacher(
        teacher_dir,
        device_map="auto",
        offload_folder=str(tmp_path / "offload"),
        model_kwargs=str(tmp_path / "more.yaml"),
    )
    assert isinstance(spread, BodyTeacher)
    assert spread.identity == plain.identity
    same(scores(spread, "sampled:8")[0], scores(plain, "sampled:8")[0])
    cache = make_cache(tmp_path / "mix.zarr", teacher=spread)
    assert not replay(cache, plain, 8, 0).bad


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_quantized_teacher_builds_and_verifies(
    name: str, tmp_path: Path, make_cache: Any, tokenizer: Any
) -> None:
    pytest.importorskip({"bnb": "bitsandbytes"}.get(name.partition("-")[0], "torchao"))
    path = save("llama", tmp_path / "model", hidden_size=64, intermediate_size=64, head_dim=32)
    teacher = load_teacher(path, quantization=name)
    assert isinstance(teacher, BodyTeacher)
    assert teacher.identity["quantization"] == name
    again, plain = load_teacher(path, quantization=name), load_teacher(path)
    assert teacher.identity == again.identity
    assert teacher.identity["weights"] != plain.identity["weights"]
    assert 0 < off(teacher, plain) < 2
    cache = make_cache(tmp_path / "mix.zarr", teacher=teacher)
    assert not replay(cache, again, 8, 0).bad


def test_a_gguf_file_is_a_teacher_with_its_tokenizer(tmp_path: Path, make_cache: Any) -> None:
    pytest.importorskip("gguf")
    path = save("llama", tmp_path / "model", hidden_size=64, intermediate_size=64, head_dim=32)
    file = write_gguf(path, tmp_path / "small.gguf")
    teacher, plain = load_teacher(file), load_teacher(path)
    assert 0 < off(teacher, plain) < 0.5
    moved = file.rename(tmp_path / "other.gguf")
    assert teacher.identity == load_teacher(moved).identity
    words = load_tokenizer(moved)
    cache = make_cache(tmp_path / "mix.zarr", teacher=teacher, tokenizer=words)
    assert not replay(cache, teacher, 8, 0).bad
    with pytest.raises(InputError, match="is quantized already"):
        load_teacher(moved, quantization="torchao-int8")


def test_attention_is_no_part_of_the_identity(teacher_dir: Path) -> None:
    eager, sdpa = (load_teacher(teacher_dir, attention=name) for name in ("eager", "sdpa"))
    assert eager.identity == sdpa.identity
    same(scores(eager, "topk:8")[0], scores(sdpa, "topk:8")[0], 1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float23"}, "Did you mean 'float32'"),
        ({"attention": "spda"}, "unknown attention 'spda'. Did you mean 'sdpa'"),
        ({"device_map": "all"}, "unknown device map 'all'"),
        ({"quantization": "int8"}, "unknown quantization 'int8'"),
        ({"tensor_parallel": 0}, "tensor_parallel: got 0, expected a whole number from 1"),
        ({"device_map": "auto", "tensor_parallel": 2}, "--device-map and --tensor-parallel: each"),
        ({"device_map": "auto", "device": "cpu"}, "--device and --device-map: each decides"),
        ({"quantization": "bnb-nf4", "tensor_parallel": 2}, "is not quantized in parts"),
        ({"offload_folder": "x"}, "--offload-folder is for --device-map"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        TeacherConfig(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel": 2}, "got 2 in a job of 1 processes, .* torchrun --nproc-per-node 2"),
        ({"revision": "main"}, "--revision is for a model of the hub"),
        ({"model_kwargs": {"dtype": "float32"}}, "model_kwargs: dtype is decided by an option"),
        ({"model_kwargs": {"tp_plan": "auto"}}, "model_kwargs: tp_plan is decided by an option"),
        ({"model_kwargs": {"no_such": 1}}, "no teacher could be loaded from .*no_such"),
        ({"model_kwargs": "/none.yaml"}, "/none.yaml is not readable YAML"),
        ({"attention": "flash_attention_3"}, "no teacher could be loaded from"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(
    options: dict[str, Any], said: str, teacher_dir: Path
) -> None:
    with pytest.raises(InputError, match=said):
        load_teacher(teacher_dir, **options)


def test_a_file_of_arguments_must_be_a_mapping(tmp_path: Path, teacher_dir: Path) -> None:
    (tmp_path / "list.yaml").write_text("[1]\n")
    with pytest.raises(InputError, match=r"got \[1\], expected a mapping"):
        load_teacher(teacher_dir, model_kwargs=str(tmp_path / "list.yaml"))


def test_parts_must_divide_the_key_value_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = save("llama", tmp_path, hidden_size=24, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(InputError, match="tensor_parallel: got 2, expected a divisor of 3"):
        load_teacher(path, tensor_parallel=2)
