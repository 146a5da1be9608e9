"""Files and directories that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddk_cache import atomic


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    made = tmp_path / "made"

    def stop_half_way() -> None:
        with atomic.whole(made) as partial:
            (partial / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert not made.exists()
    with atomic.whole(made) as partial:
        (partial / "all").touch()
    assert [path.name for path in made.iterdir()] == ["all"]
    assert list(tmp_path.iterdir()) == [made]


def test_a_file_keeps_its_old_bytes_where_the_new_ones_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    atomic.replace(path, b"old")
    with pytest.raises(TypeError):
        atomic.replace(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
