"""Students: refused where they do not fit, and saved as what they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_cache import CorruptCacheError, InputError, MismatchError
from ddk_cache.read.cache import Cache, open_cache
from ddk_cache.testing import VOCAB, byte_tokenizer
from ddk_cache.testing import student_config as llama_config
from ddk_train import train
from ddk_train.student.load import load_student, save_student
from tests.helpers import Configure, command, finish, read_weights, tree


def test_a_student_over_another_tokenizer_is_refused(
    configure: Configure, teacher_dir: Path, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(teacher_dir, student)
    assert train(configure("same", student=str(student), steps=1))
    other = byte_tokenizer()
    other.add_tokens(["novel"])
    other.save_pretrained(student)
    with pytest.raises(MismatchError, match="another tokenizer"):
        train(configure("other", student=str(student), steps=1))


def test_a_student_with_too_few_outputs_is_refused(
    configure: Configure, student_config: Path, tmp_path: Path
) -> None:
    config = json.loads(student_config.read_text()) | {"vocab_size": 256}
    (tmp_path / "small.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="outputs for 256 tokens; the cache's tokenizer has 257"):
        train(configure(student=str(tmp_path / "small.json")))


@pytest.fixture
def own_student(teacher_dir: Path, tmp_path: Path) -> Path:
    """A bfloat16 student with a tokenizer of its own ways."""
    from transformers import AutoModelForCausalLM

    path = tmp_path / "student"
    AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.bfloat16).save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"padding_side": "left", "model_max_length": 48}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_student_keeps_its_tokenizer_and_its_dtype(
    configure: Configure, own_student: Path
) -> None:
    from transformers import AutoTokenizer

    run = train(configure(student=str(own_student), steps=2))
    before, after = (AutoTokenizer.from_pretrained(path) for path in (own_student, run.student))
    assert after.chat_template == before.chat_template
    assert (after.padding_side, after.model_max_length) == ("left", 48)
    assert {t.dtype for t in read_weights(run.student).values()} == {torch.bfloat16}
    assert "bfloat16" in (run.student / "config.json").read_text()
    kept = read_weights(run.checkpoints()[-1][1] / "student")
    assert {t.dtype for t in kept.values()} == {torch.float32}


def test_files_that_the_root_does_not_name_never_reach_a_student(
    copied: Path, student_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    (copied / "tokenizer/notes.txt").symlink_to(tmp_path / "secret")
    for name in ("model.safetensors", "config.json", "evil.py"):
        (copied / "tokenizer" / name).write_text("{}")
    cache = open_cache(copied)
    student = load_student(str(student_config), cache)
    save_student(student, student.model, cache, tmp_path / "saved", {})
    saved = tree(tmp_path / "saved")
    ours = {"config.json", "generation_config.json", "model.safetensors", "ddk.json"}
    assert set(saved) == ours | set(cache.manifest.root.tokenizer_files)
    assert len(saved["model.safetensors"]) > 1000
    assert json.loads(saved["config.json"])["model_type"] == "llama"


def test_a_damaged_tokenizer_of_a_cache_is_not_saved_with_a_student(
    copied: Path, student_config: Path, tmp_path: Path
) -> None:
    cache = open_cache(copied)
    student = load_student(str(student_config), cache)
    for path in {copied / "tokenizer", cache.tokenizer_path}:
        file = path / "tokenizer.json"
        file.write_text(file.read_text().replace('"a":', '"a" :'))
    with pytest.raises(CorruptCacheError, match=r"tokenizer\.json"):
        save_student(student, student.model, cache, tmp_path / "saved", {})
    assert not (tmp_path / "saved").exists()


def test_a_student_that_lacks_weights_is_refused(
    cache: Cache, own_student: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    weights = read_weights(own_student)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, own_student / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights of its model: model\.layers\.0\.mlp"):
        load_student(str(own_student), cache)


def write_config(path: Path, **settings: Any) -> str:
    path.write_text(json.dumps(settings))
    return str(path)


def test_a_student_with_too_few_position_embeddings_is_refused(
    cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": VOCAB}
    gpt2 |= {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    enough = write_config(tmp_path / "enough.json", **gpt2, n_positions=16)
    assert load_student(enough, cache)
    short = write_config(tmp_path / "short.json", **gpt2, n_positions=15)
    with pytest.raises(InputError, match=r"has 15 positions; rows of .* have 16"):
        load_student(short, cache)
    assert not caplog.records
    rotary = write_config(tmp_path / "llama.json", **llama_config(max_position_embeddings=8))
    assert load_student(rotary, cache)
    assert "has 8 positions; rows of" in caplog.text


@pytest.mark.parametrize("flag", [False, True])
def test_code_of_a_student_runs_only_where_it_is_trusted(
    flag: bool, cache: Cache, tmp_path: Path
) -> None:
    model = tmp_path / "foreign"
    model.mkdir()
    foreign = f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ImportError('foreign code')"
    (model / "evil.py").write_text(foreign)
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    words = ["--student", model, *(["--trust-remote-code"] if flag else [])]
    code, out, err = finish(command("ddk-train", "run", cache.root, tmp_path / "run", *words))
    assert code == 2, err
    assert "[y/N]" not in out + err
    assert (tmp_path / "ran").exists() == flag


def test_code_of_a_tokenizer_is_not_run(cache: Cache, own_student: Path, tmp_path: Path) -> None:
    (own_student / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    settings = json.loads((own_student / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}}
    settings |= {"tokenizer_class": "Fast"}
    (own_student / "tokenizer_config.json").write_text(json.dumps(settings))
    words = ["--student", own_student, "--steps", 1]
    code, out, err = finish(command("ddk-train", "run", cache.root, tmp_path / "run", *words))
    assert code in (0, 2), err
    assert "[y/N]" not in out + err
    assert not (tmp_path / "ran").exists()
