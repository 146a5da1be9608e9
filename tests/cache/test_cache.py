"""A cache on disk: any Zarr reader sees it, ours sees the same, and nothing wrong is read."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import resource
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr

from ddk_cache import (
    SPLITS,
    CacheError,
    CorruptCacheError,
    FormatVersionError,
    InputError,
    NotACacheError,
    UnfinishedCacheError,
    open_cache,
)
from ddk_cache.build.writer import ShardWriter
from ddk_cache.format.documents import dump
from ddk_cache.format.plan import DomainPlan, Portion, ShardKey
from ddk_cache.hashing import canonical, digest
from ddk_cache.inspect.verify import bytes_to_hash, verify
from ddk_cache.read.cache import Cache
from ddk_cache.read.chunks import ChunkKey
from ddk_cache.storage.local import LocalStorage
from ddk_cache.testing import BUILD


def pairs(cache: Cache) -> list[tuple[str, str]]:
    return [(domain, split) for domain in cache.domains for split in SPLITS]


def plain_arrays(cache: Cache, domain: str, split: str) -> dict[str, tuple[Any, Any]]:
    """Return every array of a split as zarr-python and as tensorstore read it."""
    out = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(cache.root, mode="r")
        for name in cache.spec.arrays:
            path = cache.root / "domains" / domain / split / name
            store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
            array = group[f"domains/{domain}/{split}/{name}"]
            out[name] = (np.asarray(array), tensorstore.open(store).result().read().result())
    return out


def test_every_reader_sees_the_same_values(cache: Cache) -> None:
    for domain, split in pairs(cache):
        rows = cache.row_numbers(domain, split)
        ours = cache.read(domain, split, rows[::-1])
        plain = plain_arrays(cache, domain, split)
        for name, (ours_zarr, theirs) in plain.items():
            assert ours_zarr.dtype == cache.spec.arrays[name].dtype
            np.testing.assert_array_equal(ours_zarr, theirs)
        stored = {name: array[rows[::-1]] for name, (array, _) in plain.items()}
        np.testing.assert_array_equal(ours.tokens, stored["tokens"])
        np.testing.assert_array_equal(ours.loss_mask, stored["loss_mask"])
        decoded = cache.logprob.decode(stored["label_logprob"])
        np.testing.assert_array_equal(ours.label_logprob, decoded)
        targets = cache.codec(domain).targets(stored)
        for name in ("ids", "probs", "tail"):
            np.testing.assert_array_equal(getattr(ours.targets, name), getattr(targets, name))


def test_padding_is_impossible_and_attributes_tell_the_scale(cache: Cache) -> None:
    domain, split = "letters", "train"
    ids = plain_arrays(cache, domain, split)["tokens"][0]
    valid = cache.row_numbers(domain, split)
    padding = np.setdiff1d(np.arange(len(ids)), valid)
    assert len(padding)
    assert (ids[padding] == np.iinfo(ids.dtype).max).all()
    assert (ids[valid] < cache.spec.vocab_size).all()
    array = zarr.open_group(cache.root, mode="r")[f"domains/{domain}/{split}/label_logprob"]
    assert array.attrs["scale"] == -cache.spec.logprob_step
    assert array.attrs["unit"] == "nat"


def test_what_is_written_comes_back(cache: Cache, tmp_path: Path) -> None:
    store = ShardWriter(LocalStorage(tmp_path), cache.spec)
    generator = np.random.default_rng(0)
    plan = DomainPlan((Portion(1, 1, "", {"train": 16, "validation": 0}),))

    for rows in (1, 7, 8):
        key = ShardKey("some", "train", rows % 2)
        arrays = {
            name: generator.integers(0, 200, (rows, *layout.inner)).astype(layout.dtype)
            for name, layout in cache.spec.arrays.items()
        }
        store.restore_metadata(DomainPlan((), store.metadata("some", plan)))
        written = store.write(key, arrays)
        for name, array in arrays.items():
            read = store.read(key, name, rows)
            np.testing.assert_array_equal(read.rows, array)
            assert read.object == written[name]


@pytest.mark.parametrize("row", [-1, 10**6, 10**12])
def test_a_row_that_does_not_exist_is_named(cache: Cache, row: int) -> None:
    with pytest.raises(InputError, match=f"no row {row}"):
        cache.read("letters", "train", [row])


def test_padding_cannot_be_read(cache: Cache) -> None:
    end = cache.extents("letters", "train")[-1]
    with pytest.raises(InputError, match="no row"):
        cache.read("letters", "train", [end.start + end.rows])


def test_an_unknown_domain_is_named(cache: Cache) -> None:
    with pytest.raises(InputError, match="Did you mean 'letters'"):
        cache.read("leters", "train", [0])


# --- things that are no finished cache ------------------------------------------------------------


def edit_root(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    group = json.loads((root / "zarr.json").read_text())
    change(group["attributes"]["ddk"])
    (root / "zarr.json").write_text(json.dumps(group))


def test_what_is_no_cache_is_said_to_be_none(tmp_path: Path) -> None:
    for content in (None, "", "{}", '{"attributes": 3}', '{"attributes": {"other": 1}}'):
        if content is not None:
            (tmp_path / "zarr.json").write_text(content)
        with pytest.raises(NotACacheError, match="is not a cache"):
            open_cache(tmp_path)


def test_another_format_version_is_named(copied: Path) -> None:
    edit_root(copied, lambda body: body.update(format_version=2))
    with pytest.raises(FormatVersionError, match="version 2; this ddk reads version 3"):
        open_cache(copied)


def test_an_edited_manifest_is_noticed(copied: Path) -> None:
    edit_root(copied, lambda body: body["spec"].update(seq_len=15))
    with pytest.raises(CorruptCacheError, match="does not match its seal"):
        open_cache(copied)


def test_an_unfinished_cache_is_refused_with_its_numbers(copied: Path) -> None:
    (copied / "commits" / "letters" / "train" / "0.json").unlink()
    with pytest.raises(UnfinishedCacheError, match=r"is not finished: [\d,]+ of [\d,]+ rows are"):
        open_cache(copied)
    opened = open_cache(copied, unfinished=True)
    with pytest.raises(UnfinishedCacheError, match="letters/train/0 is not committed"):
        opened.read("letters", "train", [0])
    opened.read("letters", "train", [8])


def test_a_flipped_bit_is_never_read_as_a_number(copied: Path, cache: Cache) -> None:
    generator = np.random.default_rng(1)
    good = cache.read("digits", "train", cache.row_numbers("digits", "train"))
    objects = sorted((copied / "domains" / "digits" / "train").rglob("c/0/*"))
    for path in [path for path in objects if path.is_file()]:
        whole = path.read_bytes()
        for place in generator.integers(0, 8 * len(whole), 12):
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << int(place % 8)
            path.write_bytes(flipped)
            broken = open_cache(copied)
            try:
                rows = broken.read("digits", "train", cache.row_numbers("digits", "train"))
            except CorruptCacheError:
                pass
            else:
                np.testing.assert_array_equal(rows.tokens, good.tokens)
                np.testing.assert_array_equal(rows.targets.probs, good.targets.probs)
            assert verify(broken, lambda _: None)
        path.write_bytes(whole)


@pytest.mark.parametrize("how", ["missing", "empty", "short"])
def test_a_damaged_object_is_a_named_error(copied: Path, how: str) -> None:
    path = copied / "domains" / "digits" / "train" / "target_ids" / "c" / "0" / "0" / "0"
    whole = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(b"" if how == "empty" else whole[: len(whole) // 2])
    with pytest.raises(CacheError, match="target_ids"):
        open_cache(copied).read("digits", "train", [0])
    problems = verify(open_cache(copied), lambda _: None)
    assert len(problems) == 1
    assert str(path) in problems[0].text


def test_a_sound_cache_verifies(cache: Cache) -> None:
    heard: list[int] = []
    assert not verify(cache, heard.append)
    assert len(heard) == len(cache.manifest.shards())
    objects = [path for path in (cache.root / "domains").rglob("c/**/*") if path.is_file()]
    assert sum(heard) == sum(path.stat().st_size for path in objects) == bytes_to_hash(cache)


def test_settings_of_the_tests_give_several_shards(cache: Cache) -> None:
    assert all(cache.shard_count(domain, "train") > 1 for domain in cache.domains)
    assert cache.spec.shard_rows == BUILD["shard_rows"]


# --- open, closed, elsewhere ----------------------------------------------------------------------


def test_a_closed_cache_says_so_and_holds_nothing(copied: Path) -> None:
    def descriptors() -> int:
        return sum(str(copied) in str(path.resolve()) for path in Path("/proc/self/fd").iterdir())

    with open_cache(copied) as opened:
        opened["letters"].train[:]
        assert descriptors() > 0
        (chunk,) = opened._chunks([ChunkKey("letters", "train", 0, ("tokens",))])
        memory = weakref.ref(chunk.values[0])
        del chunk
        assert memory() is not None
    assert descriptors() == 0
    assert memory() is None
    assert "closed" in repr(opened)
    opened.close()
    for use in (
        lambda: opened["letters"].train[0],
        lambda: opened.root,
        lambda: pickle.dumps(opened),
    ):
        with pytest.raises(InputError, match=r"is closed\. Open it again"):
            use()


def test_a_pickled_cache_is_opened_again(cache: Cache) -> None:
    again = pickle.loads(pickle.dumps(cache))
    rows = again["letters"].train[[3, 1]]
    np.testing.assert_array_equal(rows.tokens, cache["letters"].train[[3, 1]].tokens)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same_and_leave_ours_alone(cache: Cache, method: str) -> None:
    whole = cache["letters"].train[:].tokens
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map(tokens_of, [(cache, place) for place in range(len(whole))])
    np.testing.assert_array_equal(np.stack(found), whole)
    np.testing.assert_array_equal(cache["letters"].train[:].tokens, whole)


def tokens_of(asked: tuple[Cache, int]) -> Any:
    """Read one row, in whatever process."""
    cache, place = asked
    return cache["letters"].train[place].tokens


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_reads_while_another_thread_of_its_parent_does(copied: Path) -> None:
    opened, stop = open_cache(copied), threading.Event()
    whole = opened["letters"].train[:].tokens

    def read() -> None:
        while not stop.is_set():
            opened["letters"].train[::-1]

    thread = threading.Thread(target=read)
    thread.start()
    children = []
    for _ in range(5):
        child = os.fork()
        if child == 0:
            os._exit(int((opened["letters"].train[:].tokens != whole).any()))
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    stop.set()
    thread.join()
    assert codes == [0] * 5


def test_a_shard_cache_is_for_urls_only(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is on a local disk already: a shard cache is for URLs"):
        open_cache(cache.root, shard_cache=tmp_path / "shards")
    with pytest.raises(InputError, match="'5X' is not a size"):
        open_cache(cache.root, shard_cache=tmp_path / "shards", shard_cache_size="5X")
    assert not (tmp_path / "shards").exists()


# --- the tokenizer --------------------------------------------------------------------------------


def test_only_the_files_of_the_tokenizer_are_given_away(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (copied / "tokenizer/model.safetensors").write_bytes(b"weights")
    (copied / "tokenizer/notes.txt").symlink_to(tmp_path / "secret")
    opened = open_cache(copied)
    files = opened.manifest.root.tokenizer_files
    assert {path.name for path in opened.tokenizer_path.iterdir()} == set(files)
    assert opened.tokenizer_path.parent != copied
    folder = opened.tokenizer_path
    del opened
    gc.collect()
    assert not folder.exists()


def test_a_changed_tokenizer_is_refused(copied: Path) -> None:
    path = copied / "tokenizer/tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"a":', b'"b":', 1) + b" ")
    with pytest.raises(CorruptCacheError, match=r"tokenizer.json is missing or damaged"):
        _ = open_cache(copied).tokenizer_path


# --- for strangers --------------------------------------------------------------------------------


def test_the_valid_rows_stand_in_the_attributes_of_a_split(cache: Cache) -> None:
    for domain, split in pairs(cache):
        group = zarr.open_group(cache.root / "domains" / domain / split, mode="r")
        assert group.attrs["valid_rows"] == [list(e) for e in cache.extents(domain, split)]


# --- sizes that are not so ------------------------------------------------------------------------


def claim(root: Path, name: str, value: int) -> None:
    """Change a size in the spec, with every seal and fingerprint to go with it."""
    edit = json.loads((root / "zarr.json").read_text())
    body = edit["attributes"]["ddk"]
    body["spec"][name] = value
    body["fingerprint"] = mark = digest(canonical(body["spec"]))
    edit["attributes"]["ddk"] = json.loads(dump(unsealed(body)))
    (root / "zarr.json").write_text(json.dumps(edit, indent=1))
    for path in [*root.glob("plans/*.json"), *root.glob("commits/*/*/*.json")]:
        body = unsealed(json.loads(path.read_text())) | {"fingerprint": mark}
        if "audit" in body and name == "seq_len":
            count = body["rows"] * value
            body["positions"] = count
            body["audit"] |= {"positions": count, "kept_mass_bins": [count] + [0] * 49}
        path.write_bytes(dump(body))


def unsealed(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in {"seal", "format_version"}}


def test_a_false_length_of_rows_is_found_before_memory_is_taken(copied: Path) -> None:
    claim(copied, "seq_len", 2**23)
    opened, before = open_cache(copied), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use in (lambda: opened.buffers(4096), lambda: opened["letters"].train[:]):
        with pytest.raises(CorruptCacheError, match=r"claims .* bytes, expected"):
            use()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**5


def test_a_vocabulary_beyond_three_bytes_is_refused(copied: Path) -> None:
    claim(copied, "vocab_size", 2**31 - 1)
    with pytest.raises(CorruptCacheError, match="vocab_size: got 2147483647, expected"):
        open_cache(copied)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sources": {}}, "it names no domain"),
        ({"tokenizer_files": {"model.safetensors": [1, "x"]}}, "is not a file of a tokenizer"),
        ({"tokenizer_files": {"config.json": [1, "x"]}}, "is not a file of a tokenizer"),
        ({"tokenizer_files": {"../x.json": [1, "x"]}}, "is not the name of a file"),
    ],
)
def test_a_root_that_makes_no_sense_is_refused(
    change: dict[str, Any], said: str, copied: Path
) -> None:
    root = json.loads((copied / "zarr.json").read_text())
    body = unsealed(root["attributes"]["ddk"]) | change
    root["attributes"]["ddk"] = json.loads(dump(body))
    (copied / "zarr.json").write_text(json.dumps(root, indent=1))
    with pytest.raises(CorruptCacheError, match=said):
        open_cache(copied)
