"""The run directory: whole or not at all, never mixed up, and clear about what is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddk_cache import DDKError, InputError, MismatchError
from ddk_train.run.directory import Run, open_run
from tests.helpers import Configure, tree

ROW = {"step": 0, "domain": "code", "weight": 1.0, "weight_before": None}


@pytest.fixture
def run(configure: Configure, tmp_path: Path) -> Run:
    """A run with a checkpoint, a line of metrics and a measurement."""
    made = Run(tmp_path / "run")
    made.open(configure(), {"known_rows": {}})
    with made.checkpoint(3, 1, 0) as path:
        (path / "state.json").write_text("{}")
    made.log({"step": 1, "loss": 2.0})
    made.record([ROW])
    return made


def test_another_run_in_the_same_place_is_refused(run: Run, configure: Configure) -> None:
    with pytest.raises(MismatchError, match=r"  seed: it has 0, this call asks for 1\n"):
        run.compare(configure(seed=1), {})
    with pytest.raises(MismatchError, match=r"student_hash: it has None.*\n.*--config .*config\.j"):
        run.compare(configure(), {"student_hash": "beef"})
    moved = configure(student="moved.json", cache="moved.zarr", log_every=3)
    assert run.compare(moved, {"known_rows": {"new": {}}}) == {"known_rows": {}}


def test_a_run_that_left_nothing_takes_other_settings(run: Run, configure: Configure) -> None:
    (run.path / "checkpoints/step-00000003/state.json").unlink()
    (run.path / "checkpoints/step-00000003").rmdir()
    run.open(configure(seed=1, weighting="uniform"), {"known_rows": {"new": {}}})
    assert run.config["settings"]["seed"] == 1
    run.student.mkdir()
    with pytest.raises(MismatchError):
        run.compare(configure(seed=2), {})


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "years of work"},
        {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights"},
        {"config.json": "{}"},
        {"config.json": '{"settings": '},
    ],
)
def test_other_directories_are_refused_and_left_alone(tmp_path: Path, files: Any) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="is not a run directory"):
        Run(tmp_path).locked().__enter__()
    assert tree(tmp_path) == before
    with pytest.raises(InputError, match="is not a run directory"):
        open_run(tmp_path)


def test_a_new_directory_goes_again_when_nothing_was_written(tmp_path: Path) -> None:
    path = tmp_path / "one" / "run"
    with Run(path).locked():
        assert path.is_dir()
    assert not path.exists()


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(run: Run) -> None:
    for name in ("checkpoints/step-00000009.partial", "student.partial"):
        (run.path / name).mkdir()
    (run.path / "config.json~host+1+2.partial").write_text("half")
    (run.path / "movie.partial").write_text("of a browser")
    with run.locked():
        pass
    names = {path.name for path in run.path.iterdir()}
    ours = {"config.json", "metrics.jsonl", "history.parquet", "checkpoints"}
    assert names == ours | {"movie.partial"}
    assert run.checkpoints() == [(3, run.path / "checkpoints/step-00000003")]


def test_only_whole_checkpoints_count(run: Run) -> None:
    for name in ("step-foo", "step-", "step-00000009.partial", "damaged-step-00000006"):
        (run.path / "checkpoints" / name).mkdir()
    assert [step for step, _ in run.checkpoints()] == [3]


def test_old_checkpoints_go_once_a_new_one_is_whole(run: Run) -> None:
    def kept() -> list[int]:
        return [step for step, _ in run.checkpoints()]

    with pytest.raises(OSError, match="full"), run.checkpoint(6, 1, 0):
        raise OSError("the disk is full")
    assert kept() == [3]
    assert not list(run.path.glob("checkpoints/*.partial"))
    for step in (6, 9, 12):
        with run.checkpoint(step, 1, 6):
            pass
    assert kept() == [6, 12]


@pytest.mark.parametrize("name", ["run:1", "a%20b", "x[1]", "memory:", "ünï"])
def test_any_name_will_do(tmp_path: Path, name: str) -> None:
    run = Run(tmp_path / name)
    run.path.mkdir()
    run.record([ROW])
    assert run.history()[0]["domain"] == "code"


def test_a_relative_path_is_not_taken_for_a_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(Path("run:1"))
    run.path.mkdir()
    run.record([ROW])
    assert run.history()[0]["domain"] == "code"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", b'{"step": 1, "lo\n'),
        ("metrics.jsonl", b'"step"\n'),
        ("metrics.jsonl", b'{"loss": 1}\n'),
        ("metrics.jsonl", b"\xff\n"),
        ("history.parquet", b"PAR1"),
        ("history.parquet", b""),
    ],
)
def test_damaged_records_are_named_and_the_run_goes_on_without_them(
    run: Run, name: str, text: bytes
) -> None:
    path = run.path / name
    path.write_bytes(text)
    with pytest.raises(DDKError, match=f"{name} is damaged: (.|\n)*delete it to resume"):
        run.rewind(3, 0)
    path.unlink()
    run.rewind(3, 0)


def test_metrics_and_history_are_cut_back_to_a_checkpoint(run: Run) -> None:
    for step in (2, 3, 4):
        run.log({"step": step})
        run.record([ROW | {"step": step}])
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut off by a kill
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]
    run.rewind(3, 2)
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]
    assert [row["step"] for row in run.history()] == [0, 2]


def test_a_run_without_a_measurement_cannot_be_opened(run: Run) -> None:
    assert open_run(run.path).path == run.path
    (run.path / "history.parquet").unlink()
    with pytest.raises(DDKError, match="no measurement yet"):
        open_run(run.path)
