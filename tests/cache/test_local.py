"""A directory as storage: links, descriptors and pickles."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from ddk_cache import CorruptCacheError
from ddk_cache.atomic import sweep
from ddk_cache.storage.base import ByteRange
from ddk_cache.storage.local import LocalStorage


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory to which the folder `linked` of the storage `root` leads."""
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "deep" / "file").write_text("mine")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "outside")
    return tmp_path / "outside"


def test_nothing_is_written_or_removed_through_a_link(outside: Path, tmp_path: Path) -> None:
    storage, made = LocalStorage(tmp_path / "root"), tmp_path / "made"
    made.write_text("new")
    for change in (
        lambda: storage.put("linked/deep/file", b"new"),
        lambda: storage.put_if_absent("linked/deep/other", b"new"),
        lambda: storage.put_file(made, "linked/file"),
        lambda: storage.delete("linked/deep/file"),
        lambda: storage.delete_dir("linked/deep"),
    ):
        with pytest.raises(CorruptCacheError, match="leads out of the cache and is left alone"):
            change()
    found = [str(path.relative_to(outside)) for path in outside.rglob("*")]
    assert sorted(found) == ["deep", "deep/file"]
    assert (outside / "deep" / "file").read_text() == "mine"
    storage.delete("linked")
    assert not (tmp_path / "root" / "linked").exists()
    assert outside.exists()


def test_a_root_that_is_a_link_is_written_to(outside: Path, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "root" / "linked")
    storage.put("a/b", b"data")
    assert (outside / "a" / "b").read_bytes() == b"data"


def test_files_are_opened_again_after_closing_and_pickling(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("one", b"0123456789")
    wanted = [ByteRange("one", 2, 3)]
    for each in (storage, pickle.loads(pickle.dumps(storage))):
        assert list(each.get_ranges(wanted)) == [b"234"]
        each.close()
        assert list(each.get_ranges(wanted)) == [b"234"]
    assert list(storage.get_many(["one", "none"])) == [b"0123456789", None]


def test_temporary_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in (
        "movie.partial",
        "a~b.partial",
        "x~host+1.partial",
        "dead~elsewhere+12+34.partial",
    ):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o600)
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a~b.partial",
        "movie.partial",
        "x~host+1.partial",
    ]
