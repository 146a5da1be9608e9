"""The recipe of docs/format.md, run as it is written, on what other Zarr readers return."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from ddk_cache import Cache, testing
from ddk_cache.types import Array

PAGE = Path(__file__).parents[2] / "docs" / "format.md"
Read = Callable[[Path, int], Array]


def with_zarr(path: Path, row: int) -> Array:
    array = zarr.open_array(path, mode="r")
    return np.asarray(array[row])


def with_tensorstore(path: Path, row: int) -> Array:
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec).result()[row].read().result())


def recipe() -> Any:
    """Return the function that the page defines."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["decode"]


@pytest.mark.parametrize("read", [with_zarr, with_tensorstore])
@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("targets", ["topk:1", "topk:8", "sampled:2", "sampled:12"])
def test_the_recipe_gives_what_the_cache_gives(
    targets: str, scale: float, read: Read, make_cache: Any, tmp_path: Path
) -> None:
    teacher = testing.random_teacher(scale=scale)
    cache: Cache = make_cache(tmp_path / "mix.zarr", targets=targets, teacher=teacher)
    name, decode = "letters", recipe()
    number = int(cache.row_numbers(name, "train")[-1])
    folder = tmp_path / "mix.zarr" / "domains" / name / "train"
    row = {path.parent.name: read(path.parent, number) for path in folder.glob("*/zarr.json")}
    group = zarr.open_group(folder.parent, mode="r")
    frequent = np.array(group.attrs["frequent_ids"], int)
    others = np.setdiff1d(np.arange(cache.spec.vocab_size), frequent)
    found = cache.read(name, "train", [number]).targets.map(lambda part: part[0])
    for s in range(cache.spec.seq_len):
        ids, probs, tail = decode(row, s, np.append(frequent, others), cache.spec.targets.size)
        kept = found.ids[s] >= 0
        np.testing.assert_array_equal(ids, found.ids[s][kept])
        np.testing.assert_allclose(probs, found.probs[s][kept], rtol=2e-6)
        np.testing.assert_allclose(tail, found.tail[s], rtol=2e-6)
