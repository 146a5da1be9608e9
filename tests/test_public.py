"""What users may rely on: exported names, commands, and how little an import or `--help` loads.

A name that disappears from a list here breaks somebody's program; a new one is a promise.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import click
import pytest

import ddk_cache
import ddk_train
from ddk_cache.cli import main as cache_main
from ddk_train.cli import main as train_main

CACHE = [
    "FORMAT_VERSION", "SPLITS", "TRAIN", "VALIDATION",
    "BuildConfig", "Cache", "CacheSpec", "Domain", "DomainPlan", "Extent", "Responder", "Rows",
    "SamplingConfig", "Source",
    "SparseTargets", "Split", "TargetSpec", "Teacher", "TeacherConfig",
    "CacheError", "CorruptCacheError", "DDKError", "FormatVersionError", "InputError",
    "MismatchError", "NotACacheError", "RowRangeError", "StorageError", "UnfinishedCacheError",
    "UnknownNameError",
    "answer_prompts", "build_cache", "build_pairs", "copy_cache", "find_sources", "generate",
    "import_cache", "load_responder", "load_teacher", "load_tokenizer",
    "open_cache", "open_pairs", "parse_size", "push_cache", "rows_at",
]  # fmt: skip
TRAIN = [
    "CacheDataset", "DistillationMixin", "DistillationTrainer", "DomainWeights", "GapCallback",
    "Gaps", "TrainConfig", "cut_student", "distillation_loss", "measure_gaps", "train",
]  # fmt: skip
COMMANDS: dict[click.Group, list[str]] = {
    cache_main: [
        "build",
        "copy",
        "estimate",
        "generate",
        "head",
        "import",
        "info",
        "pair",
        "pull",
        "push",
        "show",
        "verify",
    ],
    train_main: ["cut", "report", "run"],
}
HEAVY = {"accelerate", "datasets", "peft", "torch", "transformers", "zarr"}


def loaded(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after running `code`."""
    report = "print(json.dumps(list(sys.modules)), file=sys.stderr)"
    words = [sys.executable, "-c", f"import json, sys\ntry:\n  {code}\nfinally:\n  {report}"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stderr)}


@pytest.mark.parametrize(("package", "names"), [(ddk_cache, CACHE), (ddk_train, TRAIN)])
def test_exported_names(package: object, names: list[str]) -> None:
    assert sorted(getattr(package, "__all__", [])) == sorted(names)
    for name in names:
        assert getattr(package, name) is not None


@pytest.mark.parametrize("package", [ddk_cache, ddk_train])
def test_version_is_that_of_the_distribution(package: object) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", getattr(package, "__version__", ""))


@pytest.mark.parametrize("group", COMMANDS)
def test_commands(group: click.Group) -> None:
    assert sorted(group.commands) == COMMANDS[group]


@pytest.mark.parametrize("package", ["ddk_cache", "ddk_train", "ddk_train.report.run_report"])
def test_an_import_loads_nothing_heavy(package: str) -> None:
    assert not loaded(f"import {package}") & HEAVY


@pytest.mark.parametrize(
    "words",
    [["ddk_cache", "--help"], ["ddk_train", "--help"], ["ddk_train", "run", "--help"]]
    + [["ddk_cache", name, "--help"] for name in COMMANDS[cache_main]]
    + [["ddk_train", "report", "--help"], ["ddk_train", "cut", "--help"]],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    package, *rest = words
    assert not loaded(f"from {package}.cli import main; main({rest!r})") & HEAVY
