"""What a cache will cost: counted exactly, measured on a probe that is audited."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ddk_cache import BuildConfig, CacheError, InputError, Teacher, build_cache, find_sources
from ddk_cache.build.estimate import estimate_cache
from ddk_cache.inspect.describe import describe
from ddk_cache.read.cache import open_cache
from ddk_cache.testing import BUILD, VOCAB, random_teacher

CONFIG = BuildConfig(**BUILD)


def test_bytes_are_bounded_without_a_teacher_and_measured_with_one(
    corpus: Path, tokenizer: Any, tmp_path: Path
) -> None:
    path, sources = tmp_path / "mix.zarr", find_sources(corpus)
    bound = estimate_cache(str(path), sources, tokenizer, None, CONFIG)
    measured = estimate_cache(
        str(path), sources, tokenizer, random_teacher(), CONFIG, probe_rows=10**6
    )
    assert not path.exists()
    build_cache(path, sources, random_teacher(), tokenizer, CONFIG)
    facts = describe(open_cache(path))
    assert bound["tokens"] == measured["tokens"] == facts["tokens"]
    assert bound["hours"] is None
    assert measured["hours"] > 0
    assert measured["bytes"] < bound["bytes"]
    assert facts["bytes"] / 3 < measured["bytes"] < facts["bytes"] * 3


def test_a_teacher_that_breaks_on_the_probe_is_found(corpus: Path, tokenizer: Any) -> None:
    good = random_teacher()
    teacher = Teacher(
        lambda tokens: good.logits(tokens) * (math.nan if tokens.any() else 1),
        VOCAB,
        good.identity,
    )
    with pytest.raises(CacheError, match=r"not finite at .* of the probe") as caught:
        estimate_cache("x", find_sources(corpus), tokenizer, teacher, CONFIG)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("speed", [math.nan, math.inf, -1.0])
def test_a_speed_must_be_a_number(speed: float, corpus: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="student_speed: got"):
        estimate_cache("x", find_sources(corpus), tokenizer, None, CONFIG, student_speed=speed)
