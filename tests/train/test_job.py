"""A run from its settings: refused before anything is written, or what its config says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_cache import DDKError, InputError, MismatchError, Teacher
from ddk_cache.read.cache import Cache
from ddk_train import train
from ddk_train.report.run_report import load
from ddk_train.report.table import show
from ddk_train.run.directory import Run
from tests.helpers import Configure, command, finish, timeless, tree


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 2.0}, "cannot be read at temperature 2: the mass outside"),
        ({"lora_rank": 2}, "is for a trained student"),
        ({"weighting": "fixed", "weights": "note=1"}, "Did you mean 'notes'"),
        ({"domains": "letters,note"}, "Did you mean 'notes'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    configure: Configure, change: dict[str, Any], said: str
) -> None:
    config = configure(**change)
    with pytest.raises((InputError, MismatchError), match=said):
        train(config)
    assert not Path(config.run).exists()


@pytest.mark.parametrize(
    "chosen",
    [
        {"weighting": "ddk", "domains": "notes,letters"},
        {"weighting": "fixed", "weights": "notes=1,letters=3"},
    ],
)
def test_a_domain_that_a_run_leaves_out_is_measured_and_not_drawn(
    configure: Configure, chosen: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(configure(steps=8, **chosen))
    rows = run.history()
    assert [row["domain"] for row in rows[:3]] == ["digits", "letters", "notes"]
    for row in rows:
        assert row["student_loss"] > 0
        if row["domain"] == "digits":
            assert (row["rows_seen"], row["weight"], row["log_factor"]) == (0, 0, None)
        elif row["step"]:
            assert row["rows_seen"] > 0
    assert sum(row["weight"] for row in rows[-3:]) == pytest.approx(1)
    if "weights" in chosen:
        assert [row["weight"] for row in rows[-3:]] == pytest.approx([0, 0.75, 0.25])
    show(load([run.path]))
    assert "left out" in capsys.readouterr().out
    losses = {row["step"]: row["student_loss"] for row in rows if row["domain"] == "digits"}
    assert losses[8] != losses[0]


def test_rules_that_follow_gaps_need_no_held_out_rows(
    configure: Configure, make_cache: Callable[..., Cache], prophet: Teacher, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "mix.zarr", holdout=0.0, teacher=prophet)
    run = train(configure(cache=str(cache.root), weighting="excess", rows=3, steps=8))
    rows = run.history()
    assert {row["student_loss"] for row in rows} == {None}
    assert [row["weight"] for row in rows[:3]] == pytest.approx([1 / 3] * 3)
    last = [row["unseen_student_loss"] - row["unseen_teacher_loss"] for row in rows[-3:]]
    right = 0.5 * np.array(last) / sum(last) + 0.5 / 3
    assert [row["weight"] for row in rows[-3:]] == pytest.approx(right.tolist())
    assert len(set(right)) > 1


def test_a_tracker_gets_the_metrics(configure: Configure) -> None:
    pytest.importorskip("tensorboard")
    run = train(configure(report_to="tensorboard", steps=2))
    assert list(run.path.rglob("events.out.tfevents.*"))
    assert len(run.metrics()) == 2


def test_a_second_trainer_in_a_run_directory_is_refused(
    configure: Configure, cache: Cache, student_config: Path, tmp_path: Path
) -> None:
    words = ["--student", student_config, "--steps", 4]
    with Run(tmp_path / "run").locked():
        code, _, err = finish(command("ddk-train", "run", cache.root, tmp_path / "run", *words))
    assert code == 2
    assert f"in use by another run (process {os.getpid()} on" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_lock_is_given_back_after_an_error(configure: Configure) -> None:
    for _ in range(2):
        with pytest.raises(MismatchError, match="temperature 2"):
            train(configure(temperature=2.0))


def test_advice_after_a_failed_start_can_be_followed_in_place(configure: Configure) -> None:
    with pytest.raises(DDKError, match="Use a lower --lr, with a new run directory"):
        train(configure(lr=1e30, clip=1e30, warmup=0))
    run = train(configure(lr=1e-3, steps=3))
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]
    assert {row["step"] for row in run.history()} == {0, 3}


def test_another_number_of_steps_is_refused_where_the_learning_rate_depends_on_it(
    configure: Configure,
) -> None:
    run = train(configure(steps=6))
    with pytest.raises(MismatchError, match=r"--steps 6, this call asks for 12.*rate up to step 6"):
        train(configure(steps=12))
    with pytest.raises(MismatchError, match="it is at step 6 already"):
        train(configure(steps=3))
    assert run.config["settings"]["steps"] == 6


def test_more_steps_before_the_decay_of_wsd_give_the_run_of_so_many(configure: Configure) -> None:
    settings: dict[str, Any] = {"schedule": "wsd", "decay": 0.5, "warmup": 0, "interval": 6}
    settings |= {"checkpoint_every": 3, "weighting": "uniform"}
    whole = train(configure("whole", steps=12, **settings))
    short = train(configure("short", steps=6, **settings))
    with pytest.raises(MismatchError, match="rate up to step 6"):
        train(configure("short", steps=12, **settings))
    shutil.rmtree(short.checkpoints()[-1][1])
    shutil.rmtree(short.student)
    longer = train(configure("short", steps=12, **settings))
    assert timeless(longer.metrics()) == timeless(whole.metrics())
    assert tree(longer.student) == tree(whole.student)


def test_a_student_is_known_by_its_content_not_by_its_path(
    configure: Configure, student_config: Path, tmp_path: Path
) -> None:
    train(configure(steps=2))
    around = student_config.parent / ".." / student_config.parent.name / student_config.name
    train(configure(steps=2, student=str(around)))
    moved = tmp_path / "moved.json"
    shutil.copy(student_config, moved)
    train(configure(steps=2, student=str(moved)))
    moved.write_text(json.dumps(json.loads(moved.read_text()) | {"rms_norm_eps": 1e-3}))
    with pytest.raises(MismatchError, match="student_hash"):
        train(configure(steps=2, student=str(moved)))


def test_the_largest_seed_trains(configure: Configure) -> None:
    assert train(configure(seed=2**63 - 1, steps=1)).student.exists()
