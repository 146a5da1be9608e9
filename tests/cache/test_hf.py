"""Models, tokenizers and devices by name: present, or one clear message."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddk_cache import InputError, load_teacher, load_tokenizer
from ddk_cache.hashing import digest
from ddk_cache.hf import identify_tokenizer, pick_device
from ddk_cache.testing import byte_tokenizer


@pytest.mark.parametrize("name", ["/none/at/all", "./typo", "~/typo", "a/b/c", "../x", ""])
def test_a_path_that_leads_nowhere_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"there is no tokenizer at {name}"):
        load_tokenizer(name)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    began = time.monotonic()
    with pytest.raises(InputError, match="the hub does not answer, and it was not downloaded"):
        load_tokenizer("nobody/nothing-of-this-name")
    assert time.monotonic() - began < 15


CODE = """
import sys
from ddk_cache import load_teacher, load_tokenizer
load_tokenizer(sys.argv[1], trust_remote_code=len(sys.argv) > 2)
"""


def test_code_runs_only_where_it_is_trusted(teacher_dir: Path, tmp_path: Path) -> None:
    path, mark = tmp_path / "teacher", tmp_path / "mark"
    shutil.copytree(teacher_dir, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", CODE, str(path), *words],
            input="y\ny\ny\n", text=True, capture_output=True, check=False,
            env={"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ":".join(sys.path)},
        )  # fmt: skip

    refused = run()
    assert "runs only with --trust-remote-code" in refused.stderr
    assert "[y/N]" not in refused.stdout
    assert not mark.exists()
    assert run("trusted").returncode == 0
    assert mark.exists()


def test_a_bare_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_teacher(str(tmp_path))
    assert str(caught.value).startswith("no teacher could be loaded from")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["meta", "cuda:99", "tpu", "mps"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"device '{name}'"):
        pick_device(name)
    assert str(pick_device("cpu")) == "cpu"


@pytest.mark.parametrize(
    ("rank", "device"), [("1", "cuda:1"), ("6", "cuda:2"), (None, "cuda"), ("", "cuda")]
)
def test_processes_of_a_machine_share_its_gpus(
    rank: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(pick_device("auto")) == device


def test_each_of_several_templates_is_part_of_the_hash(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    plain = identify_tokenizer(tokenizer)
    assert plain["chat_template"] == digest(b"{{ messages }}")
    hashes = []
    for tools in ("{{ tools }}", "{{ tools | tojson }}"):
        tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": tools}
        hashes.append(identify_tokenizer(tokenizer))
        tokenizer.save_pretrained(tmp_path)
        assert identify_tokenizer(load_tokenizer(tmp_path)) == hashes[-1]
    assert len({plain["chat_template"], *(found["chat_template"] for found in hashes)}) == 3


def test_the_package_is_a_command() -> None:
    words = [sys.executable, "-m", "ddk_cache", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: ddk-cache ")
