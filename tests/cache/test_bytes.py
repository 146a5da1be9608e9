"""The bytes of a cache are a function of corpus, teacher, settings and seed: written down once.

The hashes in data/golden_arrays.json are those of every array object of five small caches, one for
each way of storing targets and of packing rows. A change of them is a change of the format, whether
meant or not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddk_cache import Cache
from ddk_cache.atomic import hash_file

GOLDEN: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parents[1] / "data" / "golden_arrays.json").read_text()
)
SETTINGS: dict[str, dict[str, Any]] = {
    "topk:8": {},
    "topk:8 at temperature 2": {"temperatures": [2.0]},
    "sampled:6": {"targets": "sampled:6", "seed": 3},
    "fast": {"compression": "fast"},
    "documents": {"packing": "documents", "seq_len": 40},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_array_objects_have_the_recorded_hashes(name: str, make_cache: Any, tmp_path: Path) -> None:
    cache: Cache = make_cache(tmp_path / "mix.zarr", **SETTINGS[name])
    found = {
        str(path.relative_to(cache.root)): hash_file(path)[1]
        for path in (cache.root / "domains").rglob("c/**/*")
        if path.is_file()
    }
    assert found == GOLDEN[name]
