"""What is damaged, swapped or invented is found by name, dropped, and made again."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from ddk_cache import (
    CacheError,
    CorruptCacheError,
    InputError,
    MismatchError,
    UnfinishedCacheError,
    open_cache,
)
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.build.teacher import Teacher
from ddk_cache.cli import main
from ddk_cache.corpus.sources import find_sources
from ddk_cache.format.documents import dump, parse
from ddk_cache.inspect.verify import (
    Part,
    Problem,
    bytes_to_hash,
    drop_bad,
    replay,
    require_sound,
    shards_of,
    verify,
)
from ddk_cache.read.cache import Cache
from ddk_cache.testing import BUILD, VOCAB, random_teacher
from tests.helpers import VICTIMS, call, quiet, tree

Make = Callable[..., Cache]


@pytest.mark.parametrize("victim", VICTIMS)
def test_what_is_bad_is_found_dropped_and_made_again(
    victim: str, copied: Path, cache: Cache, make_cache: Make
) -> None:
    whole = (copied / victim).read_bytes()
    (copied / victim).write_bytes(whole[:-3] + b"?" + whole[-2:])
    opened = open_cache(copied)
    problems = verify(opened, quiet)
    assert [problem.name for problem in problems] == [victim]
    assert drop_bad(opened, problems)
    make_cache(copied)
    assert tree(copied) == tree(cache.root)


def test_damaged_rows_that_wait_for_the_teacher_are_found_too(
    copied: Path, cache: Cache, make_cache: Make
) -> None:
    (copied / "commits/digits/train/0.json").unlink()
    victim = copied / VICTIMS[2]
    whole = victim.read_bytes()
    victim.write_bytes(b"?" + whole[1:])
    with pytest.raises(CorruptCacheError, match="tokens"):
        make_cache(copied)
    opened = open_cache(copied, unfinished=True)
    assert [problem.name for problem in verify(opened, quiet)] == [VICTIMS[2]]
    drop_bad(opened, verify(opened, quiet))
    make_cache(copied)
    assert tree(copied) == tree(cache.root)


def test_a_domain_without_its_plan_is_made_again_as_a_whole(
    copied: Path, cache: Cache, make_cache: Make
) -> None:
    plan = copied / "plans" / "letters.json"
    plan.write_bytes(plan.read_bytes().replace(b"train", b"trian", 1))
    with pytest.raises(CorruptCacheError, match=r"letters.json is damaged.*Remove it and"):
        open_cache(copied)
    plan.unlink()
    make_cache(copied)
    assert tree(copied) == tree(cache.root)


def test_token_rows_are_made_again_only_from_the_same_documents(
    copied: Path, make_cache: Make, corpus: Path, tokenizer: Any, tmp_path: Path
) -> None:
    victim = copied / VICTIMS[2]
    victim.unlink()
    opened = open_cache(copied)
    drop_bad(opened, verify(opened, quiet))
    other = tmp_path / "corpus"
    shutil.copytree(corpus, other)
    text = (other / "digits.csv").read_text()
    (other / "digits.csv").write_text(text.replace("1", "2"))
    with pytest.raises(MismatchError, match="its documents differ from those"):
        build_cache(copied, find_sources(other), random_teacher(), tokenizer, BuildConfig(**BUILD))


@pytest.mark.parametrize("name", ["../evil/zarr.json", "domains/../../zarr.json", "domains/x"])
def test_a_plan_whose_documents_lie_elsewhere_is_refused(name: str, copied: Path) -> None:
    path = copied / "plans" / "notes.json"
    body = parse(path.read_bytes(), str(path))
    body["metadata"][name] = "{}"
    path.write_bytes(dump(body))
    with pytest.raises(CorruptCacheError, match="not a Zarr document of a domain"):
        open_cache(copied)


def reseal(path: Path, keys: list[Any], value: Any) -> None:
    """Change one value of a document and give it a correct seal."""
    body = parse(path.read_bytes(), str(path))
    inner = body
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_bytes(dump(body))


@pytest.mark.parametrize("rows", [2**40, 2**62, -1, 0, 1.5, "many", None])
def test_a_plan_with_impossible_rows_is_refused_even_with_its_seal(rows: Any, copied: Path) -> None:
    reseal(copied / "plans/notes.json", ["portions", 0, "rows", "train"], rows)
    with pytest.raises(CorruptCacheError, match="notes"):
        open_cache(copied)


@pytest.mark.parametrize("ids", [[300], [-1], [5, 5], ["5"], 5, [1.0], [2**40]])
def test_a_plan_with_impossible_frequent_ids_is_refused_even_with_its_seal(
    ids: Any, copied: Path
) -> None:
    reseal(copied / "plans/notes.json", ["frequent_ids"], ids)
    with pytest.raises(CorruptCacheError, match="notes"):
        open_cache(copied)


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
    keys: list[Any], value: Any, copied: Path
) -> None:
    reseal(copied / "commits/notes/train/0.json", keys, value)
    with pytest.raises(CorruptCacheError, match=r"notes/train/0\.json"):
        open_cache(copied).read("notes", "train", [0])


def test_a_swapped_shard_is_never_read_as_the_right_one(copied: Path) -> None:
    one, two = (copied / f"domains/letters/train/target_ids/c/{n}/0/0" for n in (0, 1))
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    with pytest.raises(CorruptCacheError, match="target_ids"):
        open_cache(copied).read("letters", "train", [0])
    assert {copied / p.name for p in verify(open_cache(copied), quiet)} == {one, two}


def test_a_record_in_another_place_is_refused(copied: Path) -> None:
    folder = copied / "commits/letters/train"
    shutil.copy(folder / "1.json", folder / "0.json")
    with pytest.raises(CorruptCacheError, match="record of another shard"):
        open_cache(copied).read("letters", "train", [0])


def test_a_link_out_of_the_cache_is_refused(copied: Path, tmp_path: Path) -> None:
    victim = copied / "domains/letters/train/target_ids/c/0/0/0"
    victim.rename(tmp_path / "outside")
    victim.symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptCacheError, match="leads out of the cache"):
        open_cache(copied).read("letters", "train", [0])
    (problem,) = verify(open_cache(copied), quiet)
    assert isinstance(problem, Problem)
    assert "leads out of the cache" in problem.text


def test_parts_verify_every_shard_once_and_the_documents_with_the_first(copied: Path) -> None:
    for victim in VICTIMS:
        path = copied / victim
        path.write_bytes(path.read_bytes()[:-1] + b"~")
    cache = open_cache(copied)
    parts = [Part(number, 5) for number in range(1, 6)]
    keys = [shards_of(cache, part) for part in parts]
    assert sorted(itertools.chain(*keys)) == sorted(cache.manifest.shards())
    assert max(map(len, keys)) - min(map(len, keys)) <= 1
    whole, found = verify(cache, quiet), [verify(cache, quiet, part) for part in parts]
    assert len(whole) == len(VICTIMS)
    assert sorted(itertools.chain(*found), key=str) == sorted(whole, key=str)
    documents = [problem for problem in whole if problem.key is None]
    assert documents == [problem for problem in found[0] if problem.key is None]
    assert sum(bytes_to_hash(cache, part) for part in parts) == bytes_to_hash(cache)


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "-1/4", "a/b", "1/2/3", "1.0/2"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    assert Part.parse("3/16") == Part(3, 16)
    with pytest.raises(InputError, match="expected a part such as 3/16"):
        Part.parse(text)


def test_the_teacher_agrees_with_its_cache_and_another_does_not(cache: Cache) -> None:
    found = replay(cache, random_teacher(), 12, seed=1)
    assert found.rows == 12
    assert not found.bad
    assert found.stored_max <= cache.logprob.error + found.control_max + 1e-4
    assert found.control_mean <= found.control_max < 1e-3
    pretender = Teacher(random_teacher(1).logits, VOCAB, random_teacher().identity)
    found = replay(cache, pretender, 12, seed=1)
    assert len(found.bad) == 12
    with pytest.raises(CacheError, match="stored targets differ from this teacher in 12 of 12"):
        require_sound(cache, [], found)
    with pytest.raises(
        MismatchError, match=r"another teacher.*\n  seed: the cache has 0, this.* 1"
    ):
        replay(cache, random_teacher(1), 12, seed=1)


def test_a_cache_without_committed_rows_has_nothing_to_compare(copied: Path) -> None:
    shutil.rmtree(copied / "commits")
    with pytest.raises(UnfinishedCacheError, match="no committed row"):
        replay(open_cache(copied, unfinished=True), random_teacher(), 12, seed=1)


def test_progress_reaches_the_total_also_with_a_damaged_record(copied: Path) -> None:
    record = copied / "commits/letters/train/0.json"
    record.write_bytes(record.read_bytes()[:-3])
    opened, heard = open_cache(copied), list[int]()
    assert [problem.name for problem in verify(opened, heard.append)] == [VICTIMS[7]]
    assert sum(heard) == bytes_to_hash(opened) > 0


def test_files_that_the_root_does_not_name_are_reported_and_dropped(
    copied: Path, cache: Cache, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("mine")
    (copied / "tokenizer/model.safetensors").write_bytes(b"weights")
    (copied / "tokenizer/notes.txt").symlink_to(tmp_path / "secret")
    opened = open_cache(copied)
    problems = verify(opened, quiet)
    names = {"tokenizer/model.safetensors", "tokenizer/notes.txt"}
    assert {problem.name for problem in problems} == names
    assert all("is not part of the cache" in problem.text for problem in problems)
    drop_bad(opened, problems)
    assert tree(copied) == tree(cache.root)
    assert (tmp_path / "secret").read_text() == "mine"


@pytest.mark.parametrize("folder", ["domains/digits", "tokenizer"])
def test_nothing_outside_of_the_cache_is_dropped(folder: str, copied: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (copied / folder).rename(outside)
    (copied / folder).symlink_to(outside)
    for path in [*outside.rglob("tokens/c/0/0"), outside / "tokenizer.json"]:
        if path.exists():
            path.write_bytes(b"?" + path.read_bytes()[1:])
    before, opened = tree(outside), open_cache(copied)
    problems = verify(opened, quiet)
    assert problems
    with pytest.raises(CorruptCacheError, match=r"is left alone\. Remove the link yourself"):
        drop_bad(opened, problems)
    assert tree(outside) == before


# --- the command ----------------------------------------------------------------------------------


def command(*words: object) -> Result:
    return call(main, "verify", *words)


def test_the_command_says_how_it_ended(copied: Path) -> None:
    result = command(copied)
    assert (result.exit_code, result.stdout) == (0, "OK: all hashes match.\n")
    assert "verifying 100%" in result.stderr
    for number, said in ((0, "1 problem in"), (1, "2 problems in")):
        victim = copied / f"domains/letters/train/tail_logprob/c/{number}/0"
        victim.write_bytes(b"?" + victim.read_bytes()[1:])
        result = command(copied)
        assert result.exit_code == 1
        assert f"{said} {copied}; --drop-bad removes what is bad" in result.stderr
    assert command(copied, "--drop-bad").exit_code == 0
    result = command(copied)
    assert result.exit_code == 0
    assert "is not finished" in result.stderr


def test_dropping_and_comparing_are_two_commands(copied: Path) -> None:
    result = command(copied, "--drop-bad", "--teacher", "any")
    assert result.exit_code == 2
    assert "one at a time" in result.stderr


def test_names_of_files_are_shown_and_obeyed_by_nobody(copied: Path) -> None:
    (copied / "tokenizer/x\x1b[31m").touch()
    result = command(copied)
    assert result.exit_code == 1
    assert r"x\x1b[31m is not part of the cache" in result.stdout
