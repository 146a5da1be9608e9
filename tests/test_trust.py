"""A cache that several processes build, that is mended, that grows, and is never mixed up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_cache import CacheError, CorruptCacheError, InputError, MismatchError, open_cache
from ddk_cache.audit import audit
from ddk_cache.build import build
from ddk_cache.claims import Claims
from ddk_cache.cli import which_process
from ddk_cache.codec import TargetCodec
from ddk_cache.corpus import find_sources
from ddk_cache.domain import ShardKey
from ddk_cache.manifest import dump, parse
from ddk_cache.objects import Folder
from ddk_cache.process import owner
from ddk_cache.reader import Cache
from ddk_cache.schema import READABLE_VERSIONS
from ddk_cache.scoring import Scorer
from ddk_cache.verify import Problem, drop_bad, replay, verify
from ddk_train import TrainConfig, train
from tests.conftest import BUILD, random_teacher, tree
from tests.test_build import BUILDER
from tests.test_train import timeless

Make = Callable[..., Cache]


def quiet(amount: int) -> None:
    """Hear of progress."""


# --- several processes ----------------------------------------------------------------------------


def test_three_processes_build_the_same_cache_as_one(
    corpus: Path, cache: Cache, tmp_path: Path
) -> None:
    path = tmp_path / "mix.zarr"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER, str(path), str(corpus)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    for worker in workers:
        _, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err.decode()
    assert tree(path) == tree(cache.root)


def test_a_claim_is_exclusive_until_its_owner_is_gone(tmp_path: Path) -> None:
    mine, also_mine = Claims(Folder(tmp_path)), Claims(Folder(tmp_path))
    assert mine.take("work")
    assert not mine.take("work")
    assert not also_mine.take("work")
    mine.release("work")
    assert also_mine.take("work")
    code = (
        "from ddk_cache.claims import Claims\nfrom ddk_cache.objects import open_objects\n"
        f"assert Claims(open_objects({str(tmp_path)!r})).take('other')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "claims" / "other").exists()
    assert mine.take("other")


def test_a_claim_from_another_machine_expires_with_its_lease(tmp_path: Path) -> None:
    mine, elsewhere = Claims(Folder(tmp_path)), tmp_path / "claims" / "work"
    elsewhere.parent.mkdir()
    elsewhere.write_text("far-away+12+345")
    assert not mine.take("work")
    os.utime(elsewhere, (0, 0))
    assert mine.take("work")
    assert elsewhere.read_text() == owner()


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


@pytest.mark.parametrize("given", [(4, 4), (1, None)])
def test_a_rank_beyond_the_world_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="has to be below"):
        which_process(*given)


# --- audit ----------------------------------------------------------------------------------------


def scores() -> dict[str, Any]:
    """Return honest scores of 2 rows of 3 positions with 2 entries of 4 ids."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    shape = (2, 3, 2)
    return {
        "ids": np.broadcast_to([2, 0], shape).copy(),
        "logprobs": np.broadcast_to(np.log(p[:2]), shape).astype(np.float32),
        "tail_logprob": np.full((2, 3), np.log(0.2), np.float32),
        "label_logprob": np.full((2, 3), np.log(0.05), np.float32),
    }


def run_audit(cache: Cache, given: dict[str, Any], **stored: Any) -> dict[str, Any]:
    codec = TargetCodec(cache.spec)
    encoded = codec.encode(given) | stored
    key, labels = ShardKey("web", "train", 7), np.full((2, 3), 2)
    return audit(key, given, encoded, labels, codec, 4)


def test_an_honest_shard_passes_and_says_what_was_seen(cache: Cache) -> None:
    seen = run_audit(cache, scores())
    assert seen["positions"] == seen["correct"] == 6
    assert seen["kept_mass"] == pytest.approx(6 * 0.8, rel=1e-6)
    entropy = -(0.5 * np.log(0.5) + 0.3 * np.log(0.3) + 0.2 * np.log(0.2))
    assert seen["entropy"] == pytest.approx(6 * entropy, rel=1e-6)
    assert seen["largest_error"] <= cache.logprob.error + 1e-6
    assert sum(seen["kept_mass_bins"]) == 6


def lie(name: str, value: float) -> dict[str, Any]:
    given = scores()
    given[name][1, 2, ...] = value
    return given


LIES = {
    "not finite": lie("logprobs", np.nan),
    "above one": lie("label_logprob", 0.1),
    "do not sum to one": lie("tail_logprob", np.log(0.4)),
    "outside of the vocabulary": lie("ids", 4),
    "kept twice": lie("ids", 1),
}


@pytest.mark.parametrize("said", LIES)
def test_a_shard_that_is_no_distribution_is_refused_by_name(said: str, cache: Cache) -> None:
    with pytest.raises(CacheError, match=rf"{said}.* of web/train/7 \(rows 1–1"):
        run_audit(cache, LIES[said])


def test_disorder_and_a_wrong_encoding_are_refused(cache: Cache) -> None:
    given = scores()
    given["logprobs"] = given["logprobs"][..., ::-1].copy()
    with pytest.raises(CacheError, match="not in order"):
        run_audit(cache, given)
    with pytest.raises(CacheError, match="stored tail_logprob differ from the computed"):
        run_audit(cache, scores(), tail_logprob=np.full((2, 3), 7, np.uint16))
    with pytest.raises(CacheError, match="stored entries differ"):
        run_audit(cache, scores(), target_ids=np.zeros((2, 2, 3, 2), np.uint8))
    with pytest.raises(CacheError, match="stored entries differ"):
        run_audit(cache, scores(), target_probs=np.zeros((2, 3, 2), np.uint8))


# --- verify and mend ------------------------------------------------------------------------------


@pytest.fixture
def copy(cache: Cache, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache.root, tmp_path / "mix.zarr"))


VICTIMS = [
    "domains/letters/train/target_ids/c/1/0/0/0",
    "domains/notes/validation/label_logprob/c/0/0",
    "domains/digits/train/tokens/c/0/0",
    "domains/digits/train/loss_mask/c/1/0",
    "domains/digits/train/tokens/zarr.json",
    "domains/letters/zarr.json",
    "domains/zarr.json",
    "commits/letters/train/0.json",
    "tokenizer/tokenizer.json",
]


@pytest.mark.parametrize("victim", VICTIMS)
def test_what_is_bad_is_found_dropped_and_made_again(
    victim: str, copy: Path, cache: Cache, make_cache: Make
) -> None:
    whole = (copy / victim).read_bytes()
    (copy / victim).write_bytes(whole[:-3] + b"?" + whole[-2:])
    opened = open_cache(copy)
    problems = verify(opened, quiet)
    assert [problem.name for problem in problems] == [victim]
    assert drop_bad(opened, problems)
    make_cache(copy)
    assert tree(copy) == tree(cache.root)


def test_damaged_rows_that_wait_for_the_teacher_are_found_too(
    copy: Path, cache: Cache, make_cache: Make
) -> None:
    (copy / "commits/digits/train/0.json").unlink()
    victim = copy / VICTIMS[2]
    whole = victim.read_bytes()
    victim.write_bytes(b"?" + whole[1:])
    with pytest.raises(CorruptCacheError, match="tokens"):
        make_cache(copy)
    opened = open_cache(copy, unfinished=True)
    assert [problem.name for problem in verify(opened, quiet)] == [VICTIMS[2]]
    drop_bad(opened, verify(opened, quiet))
    make_cache(copy)
    assert tree(copy) == tree(cache.root)


def test_a_domain_without_its_plan_is_made_again_as_a_whole(
    copy: Path, cache: Cache, make_cache: Make
) -> None:
    plan = copy / "plans" / "letters.json"
    plan.write_bytes(plan.read_bytes().replace(b"train", b"trian", 1))
    with pytest.raises(CorruptCacheError, match=r"letters.json is damaged.*If it is removed"):
        open_cache(copy)
    plan.unlink()
    make_cache(copy)
    assert tree(copy) == tree(cache.root)


def test_token_rows_are_made_again_only_from_the_same_documents(
    copy: Path, make_cache: Make, corpus: Path, tokenizer: Any, tmp_path: Path
) -> None:
    victim = copy / VICTIMS[2]
    victim.unlink()
    opened = open_cache(copy)
    drop_bad(opened, verify(opened, quiet))
    other = tmp_path / "corpus"
    shutil.copytree(corpus, other)
    text = (other / "digits.csv").read_text()
    (other / "digits.csv").write_text(text.replace("1", "2"))
    with pytest.raises(MismatchError, match="its documents are not those"):
        build(copy, find_sources(other), random_teacher(), tokenizer, **BUILD)


@pytest.mark.parametrize("name", ["../evil/zarr.json", "domains/../../zarr.json", "domains/x"])
def test_a_plan_whose_documents_lie_elsewhere_is_refused(name: str, copy: Path) -> None:
    path = copy / "plans" / "notes.json"
    body, version = parse(path.read_bytes(), str(path), READABLE_VERSIONS)
    body["metadata"][name] = "{}"
    path.write_bytes(dump(body, version))
    with pytest.raises(CorruptCacheError, match="no Zarr document of a domain"):
        open_cache(copy)


def reseal(path: Path, keys: list[Any], value: Any) -> None:
    """Change one value of a document and give it a correct seal."""
    body, version = parse(path.read_bytes(), str(path), READABLE_VERSIONS)
    inner = body
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_bytes(dump(body, version))


@pytest.mark.parametrize("rows", [2**40, 2**62, -1, 0, 1.5, "many", None])
def test_a_plan_with_impossible_rows_is_refused_even_with_its_seal(rows: Any, copy: Path) -> None:
    reseal(copy / "plans/notes.json", ["portions", 0, "rows", "train"], rows)
    with pytest.raises(CorruptCacheError, match="notes"):
        open_cache(copy)


@pytest.mark.parametrize("ids", [[300], [-1], [5, 5], ["5"], 5, [1.0], [2**40]])
def test_a_plan_with_impossible_frequent_ids_is_refused_even_with_its_seal(
    ids: Any, copy: Path
) -> None:
    reseal(copy / "plans/notes.json", ["frequent_ids"], ids)
    with pytest.raises(CorruptCacheError, match="notes"):
        open_cache(copy)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["positions"], 10**29),
        (["teacher_loss"], 1e308),
        (["audit", "entropy"], 10**29),
        (["audit", "largest_error"], None),
        (["audit", "fidelity", "kl"], "none"),
        (["audit", "fidelity", "tail"], 1e300),
        (["objects", "tokens", "bytes"], 10**29),
        (["objects", "tokens", "chunks"], ""),
        (["shard"], [[]]),
    ],
)
def test_a_record_with_impossible_figures_is_refused_even_with_its_seal(
    keys: list[Any], value: Any, copy: Path
) -> None:
    reseal(copy / "commits/notes/train/0.json", keys, value)
    with pytest.raises(CorruptCacheError, match=r"notes/train/0\.json"):
        open_cache(copy).read("notes", "train", [0])


def test_a_swapped_shard_is_never_read_as_the_right_one(copy: Path) -> None:
    one, two = (copy / f"domains/letters/train/target_ids/c/{n}/0/0/0" for n in (0, 1))
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    with pytest.raises(CorruptCacheError, match="target_ids"):
        open_cache(copy).read("letters", "train", [0])
    assert {copy / p.name for p in verify(open_cache(copy), quiet)} == {one, two}


def test_a_record_in_another_place_is_refused(copy: Path) -> None:
    folder = copy / "commits/letters/train"
    shutil.copy(folder / "1.json", folder / "0.json")
    with pytest.raises(CorruptCacheError, match="record of another shard"):
        open_cache(copy).read("letters", "train", [0])


def test_a_link_out_of_the_cache_is_refused(copy: Path, tmp_path: Path) -> None:
    victim = copy / "domains/letters/train/target_ids/c/0/0/0/0"
    victim.rename(tmp_path / "outside")
    victim.symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptCacheError, match="leads out of the cache"):
        open_cache(copy).read("letters", "train", [0])
    (problem,) = verify(open_cache(copy), quiet)
    assert isinstance(problem, Problem)
    assert "leads out of the cache" in problem.text


def test_the_teacher_agrees_with_its_cache_and_another_does_not(cache: Cache) -> None:
    def score(seed: int) -> Any:
        teacher = random_teacher(seed)
        return lambda key, tokens, rows: (
            Scorer(teacher, cache.spec, rows).score(key, tokens, quiet).arrays
        )

    found = replay(cache, score(0), 12, seed=1)
    assert found.rows == 12
    assert not found.bad
    assert found.stored_max <= cache.logprob.error + found.control_max + 1e-4
    assert found.control_mean <= found.control_max < 1e-3
    assert len(replay(cache, score(1), 12, seed=1).bad) == 12


# --- growth ---------------------------------------------------------------------------------------


def lines(first: int, last: int, letters: str) -> str:
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list(letters), 40)) for _ in range(last)]
    return "".join(json.dumps({"text": text}) + "\n" for text in texts[first:])


@pytest.fixture
def growing(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "one.jsonl").write_text(lines(0, 40, "abc"))
    return folder


def grow(folder: Path) -> None:
    (folder / "one.jsonl").write_text(lines(0, 70, "abc"))
    (folder / "two.jsonl").write_text(lines(0, 30, "xyz"))


def make(folder: Path, tokenizer: Any, path: Path, **settings: Any) -> Cache:
    build(path, find_sources(folder), random_teacher(), tokenizer, **BUILD | settings)
    return open_cache(path)


def test_a_cache_grows_and_its_old_bytes_stay(
    growing: Path, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "mix.zarr"
    before = make(growing, tokenizer, path)
    old = before.read("one", "train", before.row_numbers("one", "train"))
    objects = {n: b for n, b in tree(path).items() if "/c/" in n or n.startswith("commits")}
    grow(growing)
    with pytest.raises(MismatchError, match=r"one: .*(\n.*)*--grow"):
        make(growing, tokenizer, path)
    after = make(growing, tokenizer, path, grow=True)
    now = tree(path)
    assert {name: now[name] for name in objects} == objects
    assert after.domains == ["one", "two"]
    assert [p.documents for p in after.plan("one").portions] == [40, 70]
    again = after.read("one", "train", before.row_numbers("one", "train"))
    np.testing.assert_array_equal(again.tokens, old.tokens)
    assert after.plan("one").rows("train") > before.plan("one").rows("train")
    assert not verify(after, quiet)
    assert tree(make(growing, tokenizer, path).root) == now
    assert tree(make(growing, tokenizer, path, grow=True).root) == now


def test_a_domain_grows_at_its_end_only(growing: Path, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "mix.zarr"
    make(growing, tokenizer, path)
    before = tree(path / "domains")
    text = (growing / "one.jsonl").read_text()
    (growing / "one.jsonl").write_text('{"text": "a new beginning"}\n' + text)
    with pytest.raises(MismatchError, match="grows at its end only"):
        make(growing, tokenizer, path, grow=True)
    assert tree(path / "domains") == before


def test_a_resumed_run_keeps_to_its_rows_unless_told_otherwise(
    growing: Path, tokenizer: Any, student_config: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mix.zarr"
    make(growing, tokenizer, path)

    def config(run: str, steps: int, **changes: Any) -> TrainConfig:
        paths: dict[str, Any] = {
            "cache": str(path),
            "run": str(tmp_path / run),
            "student": str(student_config),
        }
        settings: dict[str, Any] = {"rows": 4, "interval": 2, "eval_rows": 4, "log_every": 1}
        settings |= {"steps": steps, "warmup": 0, "min_lr": 1.0}
        return TrainConfig(**paths, **settings, **changes)

    whole = train(config("whole", 8))
    for run in ("kept", "told"):
        train(config(run, 4))
    grow(growing)
    make(growing, tokenizer, path, grow=True)
    kept = train(config("kept", 8))
    assert timeless(kept.history()) == timeless(whole.history())
    assert tree(kept.student).keys() == tree(whole.student).keys()
    told = train(config("told", 8, new_rows=True))
    assert {row["domain"] for row in told.history() if row["step"] == 8} == {"one", "two"}
    assert {row["domain"] for row in told.history() if row["step"] == 2} == {"one"}
    seen = {row["domain"]: row["rows_seen"] for row in told.history() if row["step"] == 8}
    assert sum(seen.values()) == 32
    assert seen["two"] > 0


# --- identity -------------------------------------------------------------------------------------


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
