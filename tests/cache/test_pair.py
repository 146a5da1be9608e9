"""Pairs: two rows each, what the teacher thinks of both, and the same checks as for rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ddk_cache import (
    InputError,
    MismatchError,
    UnfinishedCacheError,
    find_sources,
    load_teacher,
    open_pairs,
)
from ddk_cache.cli import main as cache_main
from ddk_cache.corpus.rows import split_of
from ddk_cache.sequences.config import SamplingConfig
from ddk_cache.sequences.pair import answer_prompts, build_pairs, padded, read_pairs
from ddk_cache.sequences.prompts import read_answered
from ddk_cache.types import SPLITS
from tests.helpers import call, jsonl, tree
from tests.sequences import SAMPLING, Material


@pytest.fixture
def copy(material: Material, tmp_path: Path) -> Material:
    """The material, for changing its caches."""
    shutil.copytree(material.folder, tmp_path / "copy")
    return Material(tmp_path / "copy")


def test_a_pair_is_two_rows_with_the_teachers_log_probabilities(material: Material) -> None:
    pairs, teacher = open_pairs(material.cache), load_teacher(material.folder / "teacher")
    answers = {
        row["number"]: row
        for file in sorted((material.answers / "sums").glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    }
    files = find_sources(material.out)[0].files
    theirs = [row for file in files for row in pq.read_table(file).to_pylist()]
    found = {split: pairs["sums"][split][:] for split in SPLITS}
    places = dict.fromkeys(SPLITS, 0)
    with material.open() as cache:
        holdout = cache.spec.holdout
    for number, (row, prompt) in enumerate(
        zip(theirs, read_answered(find_sources(material.out)[0]), strict=True)
    ):
        split = split_of(prompt.content, holdout)
        for ids in (row["response_ids"], answers[number]["response_ids"]):
            rows, place = found[split], places[split]
            places[split] += 1
            whole, first = row["prompt_ids"] + ids, len(row["prompt_ids"])
            assert rows.tokens[place, : len(whole)].tolist() == whole
            counted = np.flatnonzero(rows.loss_mask[place])
            assert counted.tolist() == list(range(first - 1, len(whole) - 1))
            logq = teacher.logits(torch.tensor([whole[:-1]]))[0].log_softmax(-1)
            expected = logq[first - 1 :].gather(1, torch.tensor(ids)[:, None])[:, 0]
            stored = rows.label_logprob[place][counted]
            np.testing.assert_allclose(stored, expected, atol=2**-11 + 1e-4)
    assert places == {split: pairs.plan("sums").rows(split) for split in SPLITS}
    assert min(places.values()) > 0


def test_both_rows_of_a_pair_share_a_chunk_and_a_split_is_that_of_the_rows(
    material: Material,
) -> None:
    spec = open_pairs(material.cache).spec
    assert spec.chunk_rows % 2 == spec.shard_rows % 2 == 0
    assert spec.seq_len % 16 == 0
    with material.open() as cache:
        assert spec.holdout == cache.spec.holdout
        assert spec.teacher == cache.spec.teacher


def test_the_row_of_a_response() -> None:
    tokens, mask = padded([5, 6, 7], [8, 9], 6, 0)
    assert tokens.tolist() == [5, 6, 7, 8, 9, 0, 0]
    assert mask.tolist() == [False, False, True, True, False, False]


def test_a_second_call_changes_nothing(copy: Material) -> None:
    before = tree(copy.folder)
    copy.pair(copy.cache, copy.answers)
    assert tree(copy.folder) == before


def test_lost_pairs_are_made_again_with_the_same_bytes(copy: Material) -> None:
    before = tree(copy.cache)
    place = copy.cache / "pairs"
    shutil.rmtree(place / "commits" / "words")
    (place / "domains/sums/train/tokens/c/0/0").unlink()
    with pytest.raises(UnfinishedCacheError, match="Run the same 'ddk-cache pair' again"):
        open_pairs(copy.cache)
    copy.pair(copy.cache, copy.answers)
    assert tree(copy.cache) == before


@pytest.mark.parametrize("name", ["tokens/c/0/0", "loss_mask/c/0/0", "label_logprob/c/0/0"])
def test_verify_finds_a_flipped_bit_in_pairs_and_repairs(copy: Material, name: str) -> None:
    before, path = tree(copy.cache), copy.cache / "pairs/domains/sums/train" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = call(cache_main, "verify", copy.cache)
    assert (done.exit_code, "has changed" in done.stdout) == (1, True)
    assert f"pairs/domains/sums/train/{name}" in done.stdout
    done = call(cache_main, "verify", copy.cache, "--drop-bad")
    assert (done.exit_code, "'ddk-cache pair'" in done.stderr) == (0, True)
    copy.pair(copy.cache, copy.answers)
    assert tree(copy.cache) == before
    assert call(cache_main, "verify", copy.cache).exit_code == 0


def test_info_shows_pairs(material: Material) -> None:
    done = call(cache_main, "info", material.cache)
    assert "pairs of responses, two rows each:" in done.stdout
    found = json.loads(call(cache_main, "info", material.cache, "--json").stdout)["pairs"]
    rows = found["domains"]["sums"]["rows"]
    assert rows["train"] + rows["validation"] == 2 * found["domains"]["sums"]["documents"] == 80


def test_a_cache_without_pairs_says_so(copy: Material) -> None:
    shutil.rmtree(copy.cache / "pairs")
    with pytest.raises(InputError, match="has no pairs of responses"):
        open_pairs(copy.cache)
    assert "pairs" not in json.loads(call(cache_main, "info", copy.cache, "--json").stdout)


def refused(material: Material, corpus: Path, said: str, **sampling: Any) -> None:
    """Check that pairs of a corpus are refused."""
    config = SamplingConfig(**SAMPLING | sampling)
    sources, answers = find_sources(corpus), corpus.parent / "answers"
    teacher = load_teacher(material.folder / "teacher")

    def pair() -> None:
        with material.open() as cache:
            answer_prompts(cache, sources, material.responder("student"), answers, config)
            build_pairs(cache, sources, answers, teacher, material.tokenizer)

    with pytest.raises(InputError, match=said):
        pair()


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("sums", {"prompt": "x"}, "no column 'messages' or 'prompt' with 'response'"),
        ("sums", {"prompt": "x", "response": ""}, "holds no prompt"),
        ("sums", {"messages": [{"role": "user", "content": "x"}]}, "the prompt has no response"),
        ("other", {"prompt": "x", "response": "y"}, "no such domain; it has sums, words"),
        ("sums", {"prompt": "x" * 30, "response": "y" * 30}, "1 longer than 49 tokens"),
    ],
)
def test_responses_that_cannot_be_paired_are_refused(
    material: Material, tmp_path: Path, name: str, line: dict[str, Any], said: str
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / f"{name}.jsonl").write_text(json.dumps(line))
    refused(material, tmp_path / "corpus", said)
    assert not (tmp_path / "mix.zarr").exists()


def test_equal_responses_only_are_refused(copy: Material) -> None:
    shutil.copytree(copy.folder / "student", copy.folder / "teacher", dirs_exist_ok=True)
    source = find_sources(copy.out)[0]
    for file in (copy.answers / "sums").glob("*.parquet"):
        file.unlink()
    rows = [row for file in source.files for row in pq.read_table(file).to_pylist()]
    table = pq.read_table(source.files[0]).schema.empty_table()
    for number, row in enumerate(rows):
        row["number"] = number
    pq.write_table(table.from_pylist(rows, table.schema), copy.answers / "sums" / "0.parquet")
    with pytest.raises(InputError, match=r"no pair is left of 40: 40 with equal responses, 0 long"):
        read_pairs(source, copy.answers, copy.tokenizer, 48)


def test_a_data_set_with_responses_gives_pairs(copy: Material, tmp_path: Path) -> None:
    shutil.rmtree(copy.cache / "pairs")
    (tmp_path / "corpus").mkdir()
    talk = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "so"}]
    lines = [{"messages": [{**talk[0], "content": f"how {n}"}, talk[1]]} for n in range(6)]
    (tmp_path / "corpus" / "sums.jsonl").write_text(jsonl(lines))
    words = "".join(f"is it {n},yes {n}\n" for n in range(6))
    (tmp_path / "corpus" / "words.csv").write_text("prompt,response\n" + words)
    done = call(
        cache_main, "pair", tmp_path / "corpus", copy.cache, "--teacher", copy.folder / "teacher",
        "--student", copy.folder / "student", "--max-new-tokens", 8,
        "--answers", tmp_path / "answers",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    pairs = open_pairs(copy.cache)
    for name, right in (("sums", {"so"}), ("words", {f"yes {n}" for n in range(6)})):
        rows = pairs[name].train[:]
        labels = zip(rows.tokens[::2, 1:], rows.loss_mask[::2], strict=True)
        said = {copy.tokenizer.decode(tokens[mask]) for tokens, mask in labels}
        assert said
        assert said <= {f"{text}<|endoftext|>" for text in right}


def test_another_teacher_or_student_is_refused(copy: Material) -> None:
    sources = find_sources(copy.out)
    student = load_teacher(copy.folder / "student")
    with copy.open() as cache:
        with pytest.raises(MismatchError, match="  weights: the cache has"):
            build_pairs(cache, sources, copy.answers, student, copy.tokenizer)
        other = SamplingConfig(**SAMPLING | {"seed": 5})
        answers = copy.folder / "others"
        answer_prompts(cache, sources, copy.responder("student"), answers, other)
        teacher = load_teacher(copy.folder / "teacher")
        with pytest.raises(MismatchError, match=r"(?s)student.* Or remove .*pairs to make"):
            build_pairs(cache, sources, answers, teacher, copy.tokenizer)
