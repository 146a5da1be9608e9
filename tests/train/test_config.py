"""Settings: checked at once, by name, type and value; and read from files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ddk_cache import InputError
from ddk_train import TrainConfig
from ddk_train.config import read_settings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weighting": "dkd"}, "Did you mean 'ddk'"),
        ({"precision": "fp16"}, "unknown precision"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"alpha": 1.5}, "alpha must be between 0 and 1"),
        ({"gamma": -1}, "gamma must be 0 or more"),
        ({"seed": 2**63}, r"seed must be between 0 and 2\*\*63 - 1"),
        ({"seed": -1}, "seed must be between"),
        ({"loss": "kl"}, "unknown loss 'kl'"),
        ({"loss": "jsd:2"}, "takes a number between 0 and 1"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"device": "mps"}, "unknown device 'mps'"),
        ({"device": "cuda:x"}, r"unknown device 'cuda:x'.* Known: auto, cpu, cuda, cuda:N"),
        ({"report_to": "tensorbord"}, "Did you mean 'tensorboard'"),
        ({"shard_cache_size": "50X"}, "'50X'"),
        ({"steps": "10"}, "steps: got '10', expected a value of type int"),
        ({"steps": 10.0}, "steps: got 10.0, expected a value of type int"),
        ({"steps": True}, "steps: got True, expected a value of type int"),
        ({"lr": "3e-5"}, "lr: got '3e-5', expected a value of type float"),
        ({"compile": 1}, "compile: got 1, expected a value of type bool"),
        ({"weights": {"code": 1}}, "weights: got {'code': 1}, expected a value of type str"),
        ({"cache": Path("c")}, "cache: got .*Path.*, expected a value of type str"),
        ({"weighting": "fixed"}, "belong together"),
        ({"weights": "code=1"}, "belong together"),
        ({"weighting": "fixed", "weights": "code"}, "cannot read the weight 'code'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        TrainConfig(**{"cache": "c", "run": "r", "student": "s"} | change)


def test_a_whole_number_is_a_float_too() -> None:
    assert TrainConfig(cache="c", run="r", student="s", lr=1).lr == 1


def test_a_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/one")
    config = TrainConfig(cache="~/mix.zarr", run="~/runs/a", student="org/~model")
    assert (config.cache, config.run) == ("/home/one/mix.zarr", "/home/one/runs/a")
    assert config.student == "org/~model"


def test_the_default_weighting_is_the_one_that_the_measurements_advise() -> None:
    assert TrainConfig(cache="c", run="r", student="s").weighting == "excess"


def test_settings_are_read_from_yaml_json_and_the_config_of_a_run(tmp_path: Path) -> None:
    config = TrainConfig(cache="c", run="r", student="s", lr=1e-3, compile=True)
    files = {
        "run.yaml": "lr: 1e-3\ncompile: true\n",
        "run.json": '{"lr": 1e-3, "compile": true}',
        "config.json": json.dumps({"settings": config.to_json(), "provenance": {}}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        found = read_settings(tmp_path / name)
        assert float(found["lr"]) == 1e-3
        assert found["compile"] is True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stpes: 3", "unknown setting 'stpes'. Did you mean 'steps'"),
        ("steps: [3]", r"steps: got \[3\], expected text, a number or a bool"),
        ("steps:", "steps: got None"),
        ("- steps", "got list, expected settings by name"),
        ("a: b: c", "cannot be read as settings"),
        ("[" * 3000, "cannot be read as settings"),
    ],
)
def test_files_that_hold_something_else_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        read_settings(tmp_path / "run.yaml")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as settings"):
        read_settings(tmp_path / "none.yaml")
