"""A student says what it was made from, and fits no other cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_cache.read.cache import Cache
from ddk_train import TrainConfig, train


def test_students_and_checkpoints_say_what_they_were_made_from(
    cache: Cache, student_config: Path, tmp_path: Path
) -> None:
    paths: dict[str, Any] = {
        "cache": str(cache.root),
        "run": str(tmp_path / "run"),
        "student": str(student_config),
    }
    run = train(TrainConfig(**paths, steps=2, interval=1, rows=2, eval_rows=2))
    for place in (run.student, run.checkpoints()[-1][1]):
        made_from = json.loads((place / "ddk.json").read_text())
        assert made_from["cache"]["fingerprint"] == cache.spec.fingerprint
        assert made_from["cache"]["content"]["notes"] == cache.plan("notes").content
        assert made_from["cache"]["teacher"] == {"class": "random", "seed": "0"}


@pytest.mark.parametrize("width", [257, 290, 400])
def test_a_head_padded_to_another_width_is_accepted(
    width: int, cache: Cache, student_config: Path, tmp_path: Path
) -> None:
    config = json.loads(student_config.read_text()) | {"vocab_size": width}
    (tmp_path / "student.json").write_text(json.dumps(config))
    paths: dict[str, Any] = {"cache": str(cache.root), "run": str(tmp_path / "run")}
    settings: dict[str, Any] = {"steps": 3, "interval": 3, "rows": 4, "eval_rows": 2}
    run = train(TrainConfig(**paths, student=str(tmp_path / "student.json"), **settings))
    assert np.isfinite([line["loss"] for line in run.metrics()]).all()
