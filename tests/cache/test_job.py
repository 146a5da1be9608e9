"""The build: the same bytes however often it is stopped, and only sound shards are committed."""

from __future__ import annotations

import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddk_cache import CacheError, InputError, MismatchError
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.build.teacher import Teacher
from ddk_cache.format.codec import ProbCodec
from ddk_cache.format.plan import ShardKey
from ddk_cache.inspect.verify import verify
from ddk_cache.read.cache import Cache, open_cache
from ddk_cache.testing import BUILD, VOCAB, byte_tokenizer, random_teacher
from tests.helpers import BUILDER, jsonl, tree

Make = Callable[..., Cache]


def test_targets_and_records_are_the_teachers_output(cache: Cache) -> None:
    teacher = random_teacher()
    rows = cache.read("letters", "train", cache.row_numbers("letters", "train"))
    tokens = torch.from_numpy(rows.tokens)
    p = teacher.logits(tokens[:, :-1]).double().softmax(-1)
    top = p.gather(-1, torch.from_numpy(rows.targets.ids))
    error = ProbCodec(cache.spec.prob_levels).error(top.numpy())
    # Once by the rounding of each, once by the common scale that makes them sum to one.
    bound = error + top.numpy() * (error.sum(-1, keepdims=True) + 1e-3)
    assert (np.abs(rows.targets.probs - top.numpy()) <= bound).all()
    tail = 1 - top.sum(-1).numpy()
    scale = error.sum(-1) + cache.logprob.error + 1e-5
    assert (np.abs(rows.targets.tail - tail) <= tail * scale).all()
    assert (top.min(-1).values >= p.topk(8).values.min(-1).values * (1 - 1e-6)).all()
    label = p.gather(-1, tokens[:, 1:, None])[..., 0].log()
    np.testing.assert_allclose(rows.label_logprob, label, atol=cache.logprob.error + 1e-5)
    total, positions = cache.teacher_loss("letters", "train")
    assert positions == rows.loss_mask.sum()
    assert total == pytest.approx(-label.sum().item(), rel=1e-6)


def test_a_second_build_changes_nothing_and_asks_no_teacher(
    make_cache: Make, tmp_path: Path
) -> None:
    make_cache(tmp_path / "mix.zarr")
    before = tree(tmp_path)

    def fail(tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the teacher was asked again")

    make_cache(tmp_path / "mix.zarr", teacher=Teacher(fail, VOCAB, random_teacher().identity))
    assert tree(tmp_path) == before


def test_a_teacher_that_fails_leaves_committed_shards_and_a_cache_that_resumes(
    make_cache: Make, cache: Cache, tmp_path: Path
) -> None:
    good, calls = random_teacher(), 0

    def tired(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 7:
            raise ValueError("tired")
        return good.logits(tokens)

    with pytest.raises(CacheError, match=r"the teacher failed on rows \d+–\d+ of .*: tired"):
        make_cache(tmp_path / "mix.zarr", teacher=Teacher(tired, VOCAB, good.identity))
    assert list((tmp_path / "mix.zarr" / "commits").rglob("*.json"))
    make_cache(tmp_path / "mix.zarr")
    assert tree(tmp_path / "mix.zarr") == tree(cache.root)


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_9_loses_nothing_committed_and_the_end_is_the_same_bytes(
    seed: int, corpus: Path, cache: Cache, tmp_path: Path
) -> None:
    path, chance = tmp_path / "mix.zarr", random.Random(seed)
    committed: dict[str, bytes] = {}
    for kills in range(9):
        process = subprocess.Popen(
            [sys.executable, "-c", BUILDER, str(path), str(corpus)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout
        process.stdout.readline()
        try:
            process.wait(chance.uniform(0.1, 2.5) if kills < 8 else None)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        process.stdout.close()
        now = tree(path / "commits") if path.exists() else {}
        assert {name: now.get(name) for name in committed} == committed
        committed = now
        if process.returncode == 0:
            break
        assert process.returncode == -9
    assert kills > 0
    assert tree(path) == tree(cache.root)


@pytest.mark.parametrize("write_behind", [False, True])
def test_write_behind_makes_the_same_bytes(
    write_behind: bool, corpus: Path, cache: Cache, tokenizer: Any, tmp_path: Path
) -> None:
    path, config = tmp_path / "mix.zarr", BuildConfig(**BUILD)
    build_cache(path, corpus, random_teacher(), tokenizer, config, write_behind=write_behind)
    assert tree(path) == tree(cache.root)


def test_an_error_behind_the_teacher_stops_the_build_and_it_resumes(
    make_cache: Make, corpus: Path, cache: Cache, tokenizer: Any, tmp_path: Path
) -> None:
    good, calls, path = random_teacher(), 0, tmp_path / "mix.zarr"

    def breaks(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return good.logits(tokens) * (math.nan if calls > 5 else 1)

    teacher, config = Teacher(breaks, VOCAB, good.identity), BuildConfig(**BUILD)
    with pytest.raises(CacheError, match="are not finite"):
        build_cache(path, corpus, teacher, tokenizer, config, write_behind=True)
    assert list((path / "commits").rglob("*.json"))
    assert not (path / "claims").exists()
    make_cache(path)
    assert tree(path) == tree(cache.root)


def test_kill_9_while_a_thread_writes_loses_nothing(
    corpus: Path, cache: Cache, make_cache: Make, tmp_path: Path
) -> None:
    path = tmp_path / "mix.zarr"
    code = BUILDER.replace("(**BUILD))", "(**BUILD), write_behind=True)")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(corpus)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(path.glob("commits/**/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    make_cache(path)
    assert tree(path) == tree(cache.root)


@pytest.mark.parametrize(
    ("targets", "vocab"), [("sampled:16", 128_000), ("sampled:16", 32_000), ("topk:4", 32_000)]
)
@pytest.mark.parametrize("scale", [1e-3, 0.0])
def test_a_cache_of_an_even_teacher_can_be_read(
    targets: str, vocab: int, scale: float, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": "some letters"}\n' * 3)
    weights = torch.randn(300, vocab, generator=torch.Generator().manual_seed(0)) * scale
    teacher = Teacher(lambda tokens: weights[tokens], vocab, {"class": "even"})
    config = BuildConfig(seq_len=8, targets=targets, holdout=0.0, shard_rows=4, chunk_rows=1)
    build_cache(tmp_path / "mix.zarr", tmp_path / "corpus", teacher, tokenizer, config)
    opened = open_cache(tmp_path / "mix.zarr")
    assert not verify(opened, lambda _: None)
    lost = opened.record(ShardKey("a", "train", 0)).audit["fidelity"]
    assert scale or lost["gradient_error"] > 1e6


def test_a_record_that_no_reader_accepts_is_not_committed(make_cache: Make, tmp_path: Path) -> None:
    good = random_teacher()
    surer = Teacher(lambda tokens: good.logits(tokens) * 1e8, VOCAB, good.identity)
    with pytest.raises(CacheError, match=r"digits/train/0 was not committed, because no reader"):
        make_cache(tmp_path / "mix.zarr", teacher=surer)
    assert not list(tmp_path.rglob("commits/**/*.json"))


def test_the_rank_must_be_below_the_world(corpus: Path, tokenizer: Any, tmp_path: Path) -> None:
    for rank, world in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match=f"rank: got {rank} of {world}"):
            build_cache(tmp_path / "x", corpus, random_teacher(), tokenizer, rank=rank, world=world)


def test_ctrl_c_says_how_to_resume(corpus: Path, tmp_path: Path) -> None:
    # A process that a shell started in the background ignores SIGINT; this one shall not.
    heed = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    slow = heed + BUILDER.replace("0.02", "0.3")
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(tmp_path / "mix.zarr"), str(corpus)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    process.stdout.readline()
    deadline = time.monotonic() + 60
    commits = tmp_path / "mix.zarr" / "commits"
    while not list(commits.rglob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "shards of" in err
    assert "Run the same command again to resume." in err


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seq_len": 8}, "seq_len"),
        ({"targets": "topk:4"}, "targets"),
        ({"holdout": 0.2}, "holdout"),
        ({"teacher": random_teacher(seed=1)}, "teacher"),
        ({"batch_rows": 3}, "batch_rows"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(
    make_cache: Make, cache: Cache, change: dict[str, Any], field: str
) -> None:
    before = tree(cache.root)
    with pytest.raises(MismatchError, match=f"  {field}: the cache has .*, this build asks for"):
        make_cache(cache.root, **change)
    assert tree(cache.root) == before


def test_another_tokenizer_is_refused_and_the_old_one_stays(cache: Cache, corpus: Path) -> None:
    before, other = tree(cache.root), byte_tokenizer()
    other.chat_template = "{{ messages }}"
    with pytest.raises(MismatchError, match="  tokenizer: the cache has"):
        build_cache(cache.root, corpus, random_teacher(), other, BuildConfig(**BUILD))
    assert tree(cache.root) == before


def test_a_path_that_holds_something_else_is_left_alone(make_cache: Make, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists and is not a cache"):
        make_cache(tmp_path)
    with pytest.raises(InputError, match="exists and is not a cache"):
        make_cache(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_distribution_stop_the_build(
    make_cache: Make, tmp_path: Path, value: float
) -> None:
    good = random_teacher()

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        logits = good.logits(tokens)
        logits[0, 3, 7] = value if tokens.any() else 0.0  # the first batch passes
        return logits

    with pytest.raises(CacheError, match=r"not finite at \d+ places of digits/train/0 \(rows 0"):
        make_cache(tmp_path / "mix.zarr", teacher=Teacher(broken, VOCAB, good.identity))
    assert not list(tmp_path.rglob("commits/**/*.json"))


def test_out_of_memory_halves_the_batch_and_says_so(
    make_cache: Make, cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, sizes = random_teacher(), []

    def small(tokens: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tokens))
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return good.logits(tokens)

    made = make_cache(tmp_path / "mix.zarr", teacher=Teacher(small, VOCAB, good.identity))
    assert sizes[:4] == [1, 4, 2, 1]  # the teacher is tried on one row first
    assert set(sizes[4:]) == {1}
    said = [one.getMessage() for one in caplog.records if one.name == "ddk_cache.build.scoring"]
    assert said[-1] == "out of memory: rows in a batch are now 1"
    assert made.record(ShardKey("digits", "train", 0)).batch_rows == 1
    rows = cache.row_numbers("digits", "train")
    ours, theirs = made.read("digits", "train", rows), cache.read("digits", "train", rows)
    np.testing.assert_allclose(ours.targets.probs, theirs.targets.probs, rtol=0.01)


def test_conversations_are_cached_with_their_mask(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "how are you"}, {"role": "assistant", "content": "fine"}]
    lines = jsonl({"messages": [*talk, *talk[: n % 2 * 2]]} for n in range(30))
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "talk.jsonl").write_text(lines)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    path = tmp_path / "mix.zarr"
    build_cache(path, tmp_path / "chat", random_teacher(), tokenizer, BuildConfig(**BUILD))
    made = open_cache(path)
    rows = made.read("talk", "train", made.row_numbers("talk", "train"))
    labels = rows.tokens[:, 1:][rows.loss_mask]
    assert 0 < rows.loss_mask.mean() < 0.5
    assert set(tokenizer.decode(labels).split("fine")) == {""}
    _, positions = made.teacher_loss("talk", "train")
    assert positions == rows.loss_mask.sum()
