"""Every example runs, from an empty folder, as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

SCRIPTS = {
    "own_teacher.py": (["mix.zarr"], [], "letters: 73 rows"),
    "read_with_zarr.py": (["mix.zarr"], ["xarray"], "nats per token over 73 rows"),
    "hf_trainer.py": (["mix.zarr", "student"], [], "'weight/notes': "),
    "trl_sft.py": (["mix.zarr", "student"], ["trl", "peft"], "'train_loss'"),
}
"""Name → its arguments, the packages that it needs, and a part of what it prints."""


def test_every_example_is_here() -> None:
    found = {path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".ipynb"}}
    assert found == {*SCRIPTS, "inspect_cache.ipynb"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    arguments, packages, expected = SCRIPTS[name]
    for package in packages:
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    if "student" in arguments:
        assert (tmp_path / "student/tokenizer.json").exists()


@pytest.mark.filterwarnings("ignore")  # of the packages of Jupyter
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(EXAMPLES / "inspect_cache.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    outputs = str([cell.get("outputs") for cell in notebook.cells])
    assert "teacher loss (nats)" in outputs
