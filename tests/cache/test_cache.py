"""A cache on disk: any Zarr reader sees it, ours sees the same, and nothing wrong is read."""

from __future__ import annotations

import json
import shutil
import warnings
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
from ddk_cache.format.plan import DomainPlan, Portion, ShardKey
from ddk_cache.read.cache import Cache, object_sizes
from ddk_cache.storage.local import LocalStorage
from ddk_cache.testing import BUILD
from ddk_cache.verify import verify


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
        store.write(key, arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(store.read(key, name, rows), array)


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


@pytest.fixture
def copy(cache: Cache, tmp_path: Path) -> Path:
    shutil.copytree(cache.root, tmp_path / "mix.zarr")
    return tmp_path / "mix.zarr"


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


def test_another_format_version_is_named(copy: Path) -> None:
    edit_root(copy, lambda body: body.update(format_version=3))
    with pytest.raises(FormatVersionError, match="version 3; this ddk reads version 2"):
        open_cache(copy)


def test_an_edited_manifest_is_noticed(copy: Path) -> None:
    edit_root(copy, lambda body: body["spec"].update(seq_len=15))
    with pytest.raises(CorruptCacheError, match="does not match its seal"):
        open_cache(copy)


def test_an_unfinished_cache_is_refused_with_its_numbers(copy: Path) -> None:
    (copy / "commits" / "letters" / "train" / "0.json").unlink()
    with pytest.raises(UnfinishedCacheError, match=r"is not finished: [\d,]+ of [\d,]+ rows are"):
        open_cache(copy)
    opened = open_cache(copy, unfinished=True)
    with pytest.raises(UnfinishedCacheError, match="letters/train/0 is not committed"):
        opened.read("letters", "train", [0])
    opened.read("letters", "train", [8])


def test_a_flipped_bit_is_never_read_as_a_number(copy: Path, cache: Cache) -> None:
    generator = np.random.default_rng(1)
    good = cache.read("digits", "train", cache.row_numbers("digits", "train"))
    objects = sorted((copy / "domains" / "digits" / "train").rglob("c/0/*"))
    for path in [path for path in objects if path.is_file()]:
        whole = path.read_bytes()
        for place in generator.integers(0, 8 * len(whole), 12):
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << int(place % 8)
            path.write_bytes(flipped)
            broken = open_cache(copy)
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
def test_a_damaged_object_is_a_named_error(copy: Path, how: str) -> None:
    path = copy / "domains" / "digits" / "train" / "target_ids" / "c" / "0" / "0" / "0" / "0"
    whole = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(b"" if how == "empty" else whole[: len(whole) // 2])
    with pytest.raises(CacheError, match="target_ids"):
        open_cache(copy).read("digits", "train", [0])
    problems = verify(open_cache(copy), lambda _: None)
    assert len(problems) == 1
    assert str(path) in problems[0].text


def test_a_sound_cache_verifies(cache: Cache) -> None:
    heard: list[int] = []
    assert not verify(cache, heard.append)
    assert len(heard) == len(cache.manifest.shards())
    assert sum(heard) == sum(object_sizes(cache).values())


def test_settings_of_the_tests_give_several_shards(cache: Cache) -> None:
    assert all(cache.shard_count(domain, "train") > 1 for domain in cache.domains)
    assert cache.spec.shard_rows == BUILD["shard_rows"]
