"""The two command lines: their options, how fast they answer, and how they say no."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result

from ddk_cache import InputError
from ddk_cache.cli import main as cache_main
from ddk_cache.console import Progress
from ddk_cache.options import which_process
from ddk_cache.read.cache import Cache
from ddk_train.cli import main as train_main
from tests.helpers import call

MODEL = (
    "--dtype --device --trust-remote-code --revision --attention --device-map --offload-folder "
    "--tensor-parallel --quantization --model-kwargs"
)
HOW = f"{MODEL} --model --head"
SETTINGS = (
    "--tokenizer --seq-len --packing --too-long --targets --temperature --seed --compression "
    f"--holdout --learn --chunk-rows --shard-rows --batch-rows {HOW}"
)
SAMPLING = "--max-new-tokens --temperature --top-p --seed --batch"

OPTIONS = {
    "ddk-cache estimate": f"--teacher {SETTINGS} --probe-rows --student-speed --json",
    "ddk-cache build": f"--teacher {SETTINGS} --grow --rank --world "
    "--ray --workers --gpus-per-worker",
    "ddk-cache generate": f"--teacher --tokenizer --samples {SAMPLING} {MODEL} --rank --world",
    "ddk-cache pair": f"--teacher --student --answers {SAMPLING} {HOW} --rank --world --batch-rows",
    "ddk-cache head": "--trust-remote-code --revision",
    "ddk-cache copy": "--domains --splits",
    "ddk-cache push": "--private",
    "ddk-cache pull": "",
    "ddk-cache import": "--tokenizer --domain --vocab-size --seq-len --holdout",
    "ddk-cache info": "--json",
    "ddk-cache show": "--domain --row --split --json",
    "ddk-cache verify": f"--drop-bad --part --teacher --rows --seed {HOW} --json",
    "ddk-train run": "--config --student --trust-remote-code --shard-cache --shard-cache-size "
    "--weighting --alpha --rho --window --shrink --tilt --repetition-guard --domains --weights "
    "--interval --eval-rows --forgetting "
    "--gamma --loss --temperature --pairs --pair-rows --rows-weight --beta --margin --per-token "
    "--steps --rows --micro-rows --lr --min-lr --warmup --schedule "
    "--decay --optimizer --weight-decay --beta2 --clip --lora-rank --keep-adapter --seed --device "
    "--precision --gradient-checkpointing --compile --checkpoint-every --keep --patience "
    "--new-rows --log-every --report-to",
    "ddk-train cut": "--layers --keep",
    "ddk-train report": "--html --json",
}


def test_the_options_are_these() -> None:
    found = {}
    for program, group in (("ddk-cache", cache_main), ("ddk-train", train_main)):
        assert isinstance(group, click.Group)
        for name, sub in group.commands.items():
            options = [p.opts[0] for p in sub.params if isinstance(p, click.Option)]
            found[f"{program} {name}"] = " ".join(options)
    assert found == OPTIONS


def test_the_rate_of_a_resumed_job_is_that_of_this_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with Progress("counting", 1000, "steps", done=900) as progress:
        time.sleep(0.1)
        progress.advance(1)
    line = caplog.messages[-1]
    assert "901 of 1,000 steps" in line
    assert 0 < float(line.split("steps  ")[1].split()[0]) <= 10


@pytest.mark.parametrize("package", ["ddk_cache", "ddk_train"])
def test_help_answers_at_once_and_without_torch(package: str) -> None:
    code = (
        f"import sys; from {package}.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'zarr', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.5


def refused(result: Result, code: int, *said: str) -> None:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    for text in said:
        assert text in result.stderr, result.stderr


# --- ddk-cache ------------------------------------------------------------------------------------


def test_build_refuses_what_does_not_exist(tmp_path: Path, corpus: Path, teacher_dir: Path) -> None:
    out = tmp_path / "mix.zarr"
    result = call(cache_main, "build", tmp_path / "none", out, "--teacher", teacher_dir)
    refused(result, 2, "no corpus at")
    result = call(cache_main, "build", corpus, out, "--teacher", tmp_path / "none")
    refused(result, 2, "there is no tokenizer at")
    (tmp_path / "bare").mkdir()
    words = ["--tokenizer", teacher_dir, "--teacher", tmp_path / "bare"]
    refused(call(cache_main, "build", corpus, out, *words), 2, "no teacher could be loaded from")
    words = ["--teacher", teacher_dir, "--device", "cuda:9"]
    refused(call(cache_main, "build", corpus, out, *words), 2, "cuda:9")
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--targets", "tokp:4"], "Did you mean 'topk'"),
        (["--targets", "topk:301"], "more entries than the teacher's vocabulary has (300)"),
        (["--dtype", "float23"], "Did you mean 'float32'"),
        (["--holdout", "1.5"], "1.5"),
        (["--seq-len", "0"], "seq_len: got 0, expected a whole number from 1"),
        (["--sequence", "8"], "No such option"),
        (["--seq-len", "100000"], "seq_len: got 100,000, expected at most 64, the positions"),
        (["--chunk-rows", "3", "--shard-rows", "8"], "not a whole number of chunks"),
    ],
)
def test_build_refuses_settings_by_name(
    words: list[str], said: str, tmp_path: Path, corpus: Path, teacher_dir: Path
) -> None:
    base = [corpus, tmp_path / "mix.zarr", "--teacher", teacher_dir, "--seq-len", 16]
    refused(call(cache_main, "build", *base, *words), 2, said)
    assert not (tmp_path / "mix.zarr").exists()


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        ({}, (None, None), (0, 1)),
        ({}, (2, 4), (2, 4)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (None, None), (3, 8)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (0, 2), (0, 2)),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4"}, (None, None), (0, 4)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (None, None), (1, 2)),
    ],
)
def test_rank_and_world_come_from_the_launcher(
    names: dict[str, str], given: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert which_process(*given) == expected


def test_processes_with_one_teacher_are_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert which_process(None, None, together=True) == (0, 1)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    assert which_process(None, None, together=True) == (3, 4)


@pytest.mark.parametrize("given", [(4, 4), (1, None)])
def test_a_rank_beyond_the_world_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="rank: got"):
        which_process(*given)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_launcher_that_gives_no_numbers_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path
) -> None:
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", name: "x"}.items():
        monkeypatch.setenv(variable, value)
    result = call(cache_main, "build", corpus, tmp_path / "x", "--teacher", "/none")
    refused(result, 2, f"{name}: got 'x', expected a whole number")


def test_one_rank_speaks(corpus: Path, teacher_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "my mix.zarr"
    base = ["build", corpus, out, "--teacher", teacher_dir, "--seq-len", 16, "--world", 2]
    base += ["--holdout", 0.3]
    quiet = call(cache_main, *base, "--rank", 1)
    assert (quiet.exit_code, quiet.output) == (0, "")
    spoken = call(cache_main, *base, "--rank", 0)
    assert spoken.exit_code == 0
    assert f"ddk-train run '{out}' RUN" in spoken.stderr


def test_build_leaves_another_directory_alone(
    tmp_path: Path, corpus: Path, teacher_dir: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    # A taken place is reported before the teacher is looked for.
    result = call(cache_main, "build", corpus, tmp_path, "--teacher", "/none/at/all")
    refused(result, 2, "exists and is not a cache")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_info_and_verify(cache: Cache) -> None:
    shown = call(cache_main, "info", cache.root)
    assert shown.exit_code == 0
    facts = json.loads(call(cache_main, "info", cache.root, "--json").stdout)
    assert set(facts["domains"]) == {"digits", "letters", "notes"}
    assert all(name in shown.stdout for name in facts["domains"])
    assert facts["bytes"] == sum(
        path.stat().st_size for path in (cache.root / "domains").rglob("c/**/*") if path.is_file()
    )
    assert call(cache_main, "verify", cache.root).exit_code == 0
    assert json.loads(call(cache_main, "verify", cache.root, "--json").stdout) == {"problems": []}


def test_verify_fails_on_a_changed_byte(copied: Path) -> None:
    victim = copied / "domains/notes/train/tail_logprob/c/0/0"
    victim.write_bytes(b"x" + victim.read_bytes()[1:])
    result = call(cache_main, "verify", copied)
    refused(result, 1, "1 problem in", "--drop-bad")
    assert f"BAD  {victim} has changed" in result.stdout


def test_estimate_counts_exactly_and_measures_with_a_teacher(
    corpus: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mix.zarr"
    words = ["--seq-len", 16, "--targets", "topk:8", "--holdout", 0.3, "--shard-rows", 8]
    words += ["--chunk-rows", 2]
    result = call(cache_main, "estimate", corpus, out, "--tokenizer", teacher_dir, *words, "--json")
    assert result.exit_code == 0, result.output
    counted = json.loads(result.stdout)
    assert not out.exists()
    assert counted["hours"] is None
    result = call(cache_main, "estimate", corpus, out, "--teacher", teacher_dir, *words, "--json")
    planned = json.loads(result.stdout)
    assert planned["hours"] > 0
    assert planned["domains"] == counted["domains"]
    assert (
        call(cache_main, "estimate", corpus, out, "--teacher", teacher_dir, *words).exit_code == 0
    )
    built = call(cache_main, "build", corpus, out, "--teacher", teacher_dir, *words)
    assert built.exit_code == 0, built.output
    facts = json.loads(call(cache_main, "info", out, "--json").stdout)
    assert planned["tokens"] == facts["tokens"]
    assert planned["shards"] == len(list((out / "commits").rglob("*.json")))
    for name, domain in facts["domains"].items():
        assert planned["domains"][name]["rows"] == domain["rows"]
        assert planned["domains"][name]["documents"] == domain["documents"]
    result = call(cache_main, "verify", out, "--teacher", teacher_dir, "--rows", 5)
    assert result.exit_code == 0, result.output
    assert "teacher on 5 rows" in result.stdout


def test_estimate_needs_something_to_count_with(corpus: Path, tmp_path: Path) -> None:
    refused(call(cache_main, "estimate", corpus, tmp_path / "x"), 2, "at least --tokenizer")


def test_estimate_refuses_what_cannot_be_built(
    corpus: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    base = [corpus, tmp_path / "x", "--tokenizer", teacher_dir]
    result = call(cache_main, "estimate", *base, "--seq-len", 100_000)
    refused(result, 2, "do not fill one training row")
    result = call(cache_main, "estimate", *base, "--student-speed", "nan")
    refused(result, 2, "student_speed: got nan")
    result = call(cache_main, "estimate", *base, "--device", "tpu")
    refused(result, 2, "unknown device 'tpu'")


def test_verify_refuses_another_teacher_and_drops_what_is_bad(
    copied: Path, teacher_dir: Path
) -> None:
    result = call(cache_main, "verify", copied, "--teacher", teacher_dir)
    refused(
        result,
        2,
        "was built with another teacher",
        "class: the cache has random, this teacher has Llama",
    )
    victim = copied / "domains/notes/train/tail_logprob/c/0/0"
    victim.write_bytes(victim.read_bytes()[:-1])
    result = call(cache_main, "verify", copied, "--drop-bad")
    assert result.exit_code == 0, result.output
    assert "commits/notes/train/0.json" in result.stdout
    assert "Run the same 'ddk-cache build' again" in result.stderr
    refused(call(cache_main, "verify", copied), 0, "is not finished")


@pytest.mark.parametrize("name", ["info", "verify"])
def test_what_is_no_cache_is_refused(name: str, tmp_path: Path) -> None:
    refused(call(cache_main, name, tmp_path), 1, "is not a cache")
    refused(call(cache_main, name, tmp_path / "none"), 1, "is not a cache")


# --- ddk-train ------------------------------------------------------------------------------------


def test_run_refuses_what_is_no_finished_cache(
    copied: Path, tmp_path: Path, student_config: Path
) -> None:
    words = [tmp_path / "run", "--student", student_config]
    refused(call(train_main, "run", tmp_path / "none", *words), 1, "is not a cache")
    (copied / "commits/notes/train/1.json").unlink()
    refused(call(train_main, "run", copied, *words), 1, "is not finished", "ddk-cache build")
    root = json.loads((copied / "zarr.json").read_text())
    root["attributes"]["ddk"]["format_version"] = 9
    (copied / "zarr.json").write_text(json.dumps(root))
    refused(call(train_main, "run", copied, *words), 1, "has format version 9")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weighting", "dkd"], "Did you mean 'ddk'"),
        (["--precision", "bf61"], "Did you mean 'bf16'"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--steps", "many"], "'many' is not a valid integer"),
        (["--step", "3"], "Did you mean"),
        (["--student", "/none/at/all"], "there is no student at"),
        (["--device", "tpu9"], "unknown device 'tpu9'"),
    ],
)
def test_run_refuses_settings_by_name(
    words: list[str], said: str, cache: Cache, tmp_path: Path, student_config: Path
) -> None:
    base = [cache.root, tmp_path / "run", "--student", student_config]
    refused(call(train_main, "run", *base, *words), 2, said)
    assert not (tmp_path / "run").exists()


def test_report_refuses_what_is_no_run(tmp_path: Path) -> None:
    refused(call(train_main, "report", tmp_path), 2, "is not a run directory")


def test_run_and_report_as_a_person_would(
    cache: Cache, tmp_path: Path, student_config: Path
) -> None:
    runs = [tmp_path / name for name in ("one", "two")]
    for path, weighting in zip(runs, ("ddk", "uniform"), strict=True):
        words = ["--student", student_config, "--weighting", weighting]
        words += ["--steps", 4, "--interval", 2, "--rows", 4]
        result = call(train_main, "run", cache.root, path, *words)
        assert result.exit_code == 0, result.output
        assert all(name in result.stdout for name in cache.domains)
    result = call(train_main, "report", *runs)
    assert result.exit_code == 0, result.output
    page = runs[0] / "report.html"
    assert str(page) in result.stdout
    assert "<svg" in page.read_text()
    facts = json.loads(call(train_main, "report", *runs, "--json").stdout)
    assert len(facts) == 2
