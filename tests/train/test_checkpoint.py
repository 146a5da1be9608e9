"""Resuming: bit for bit, past a damaged checkpoint, and after one that could not be written."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddk_cache import Cache, DDKError
from ddk_train import train
from tests.helpers import Configure, timeless, tree
from tests.runs import copy_up_to


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    configure: Configure, tmp_path: Path
) -> None:
    whole = train(configure("whole"))
    for step, checkpoint in whole.checkpoints()[:-1]:
        path = tmp_path / f"from-{step}"
        copy_up_to(checkpoint, whole, path)
        with (path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "lo')  # a line torn by a kill
        resumed = train(configure(path.name))
        assert timeless(resumed.metrics()) == timeless(whole.metrics())
        assert timeless(resumed.history()) == timeless(whole.history())
        assert tree(resumed.student) == tree(whole.student)
        last, again = whole.checkpoints()[-1][1], resumed.checkpoints()[-1][1]
        assert (last / "torch.pt").read_bytes() == (again / "torch.pt").read_bytes()


def test_a_run_that_remembers_measurements_resumes_bit_for_bit(
    configure: Configure, prophet_cache: Cache, tmp_path: Path
) -> None:
    settings = {
        "cache": str(prophet_cache.root),
        "weighting": "gain",
        "interval": 2,
        "shrink": True,
    }
    whole = train(configure("whole", **settings))
    weights = {row["weight"] for row in whole.history() if row["step"] >= 4}
    assert len(weights) > 3
    for step, checkpoint in whole.checkpoints()[1:-1]:
        path = tmp_path / f"from-{step}"
        copy_up_to(checkpoint, whole, path)
        resumed = train(configure(path.name, **settings))
        assert timeless(resumed.history()) == timeless(whole.history())
        last, again = whole.checkpoints()[-1][1], resumed.checkpoints()[-1][1]
        assert tree(last / "student") == tree(again / "student")
        assert (last / "torch.pt").read_bytes() == (again / "torch.pt").read_bytes()


@pytest.mark.parametrize(
    "name", ["torch.pt", "state.json", "student/model.safetensors", "ddk.json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    configure: Configure, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(configure())
    student, metrics = tree(run.student), timeless(run.metrics())
    steps = [step for step, _ in run.checkpoints()]
    last = run.checkpoints()[-1][1]
    if name == "ddk.json":
        (last / name).unlink()
    else:
        (last / name).write_bytes((last / name).read_bytes()[:50])
    again = train(configure())
    assert f"the checkpoint {last} is damaged" in caplog.text
    assert timeless(again.metrics()) == metrics
    assert tree(again.student) == student
    assert [step for step, _ in again.checkpoints()] == steps
    assert (last.parent / f"damaged-{last.name}").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_starts_anew(
    configure: Configure,
) -> None:
    run = train(configure(steps=3))
    student = tree(run.student)
    shutil.rmtree(run.student)
    for _, path in run.checkpoints():
        (path / "state.json").write_text("")
    with pytest.raises(DDKError, match=r"no checkpoint of .* can be read.*damaged-step-00000003"):
        train(configure(steps=3))
    assert tree(train(configure(steps=3)).student) == student


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writes beyond a file size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10_000, 40_000])  # the student, and the optimizer's states
def test_a_full_disk_is_named_and_the_checkpoint_before_stays(
    configure: Configure, size: int
) -> None:
    whole = train(configure("whole"))
    run = train(configure())
    (first, _), *later = run.checkpoints()
    for _, path in later:
        shutil.rmtree(path)
    said = rf"of step {later[0][0]} cannot be written to .*The last checkpoint is step {first}\."
    with largest_file(size), pytest.raises(DDKError, match=said):
        train(configure())
    assert [step for step, _ in run.checkpoints()] == [first]
    assert not list(run.path.rglob("*.partial"))
    assert tree(train(configure()).student) == tree(whole.student)
