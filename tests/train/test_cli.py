"""ddk-train: options from the settings, files of settings, and how a run ends for a person."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import pytest
import yaml

from ddk_cache.read.cache import Cache
from ddk_train.cli import main
from ddk_train.config import TrainConfig
from ddk_train.run.directory import Run
from tests.helpers import call, command, finish

FAST = ["--steps", 2, "--interval", 2, "--rows", 4, "--eval-rows", 2]


def test_every_setting_has_an_option_with_its_default_and_a_help() -> None:
    assert isinstance(main, click.Group)
    params = {param.name: param for param in main.commands["run"].params}
    assert set(params) == {*TrainConfig.__dataclass_fields__, "config"}
    for name, field in TrainConfig.__dataclass_fields__.items():
        option = params[name]
        if isinstance(option, click.Option):
            assert option.help
            assert option.help.endswith(".")
            assert option.required or option.default == field.default


def test_a_file_gives_settings_and_the_command_line_wins(
    cache: Cache, student_config: Path, tmp_path: Path
) -> None:
    settings = {"student": str(student_config), "steps": 2, "interval": 2, "rows": 4}
    settings |= {"eval_rows": 2, "seed": 7, "keep_adapter": True, "cache": "none", "run": "none"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings) + "lr: 1e-3\n")
    words = ["run", cache.root, tmp_path / "a", "--config", tmp_path / "run.yaml", "--seed", 8]
    result = call(main, *words)
    assert result.exit_code == 0, result.output
    had = Run(tmp_path / "a").config["settings"]
    assert (had["lr"], had["seed"], had["steps"], had["keep_adapter"]) == (1e-3, 8, 2, True)
    assert had["cache"] == str(cache.root)


def test_a_run_is_repeated_from_its_config(
    cache: Cache, student_config: Path, tmp_path: Path
) -> None:
    first = call(main, "run", cache.root, tmp_path / "a", "--student", student_config, *FAST)
    assert first.exit_code == 0, first.output
    config = tmp_path / "a/config.json"
    again = call(main, "run", cache.root, tmp_path / "b", "--config", config)
    assert again.exit_code == 0, again.output
    files = [tmp_path / run / "student/model.safetensors" for run in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    resumed = call(main, "run", cache.root, tmp_path / "a", "--config", config)
    assert resumed.exit_code == 0, resumed.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: 1.5", "'1.5' is not a valid integer"),
        ("steps: true", "'True' is not a valid integer"),
        ("stpes: 2", "Did you mean 'steps'"),
        ("weighting: dkd", "Did you mean 'ddk'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    cache: Cache, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    words = ["run", cache.root, tmp_path / "a", "--config", tmp_path / "run.yaml"]
    assert "Missing option '--student'" in call(main, *words[:3]).stderr
    result = call(main, *words, "--student", "s")
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not (tmp_path / "a").exists()


def test_a_finished_run_exits_with_0_on_a_terminal_that_cannot_show_it(
    cache: Cache, student_config: Path, tmp_path: Path
) -> None:
    words = [cache.root, tmp_path / "run ü", "--student", student_config, *FAST]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    code, _, err = finish(command("ddk-train", "run", *words, env=environment))
    assert code == 0, err
    assert "Traceback" not in err
    assert "the student is in" in err


def test_a_home_directory_is_expanded(
    cache: Cache, student_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = call(main, "run", cache.root, "~/run:1", "--student", student_config, *FAST)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run:1/config.json").read_text())["settings"]["steps"] == 2
