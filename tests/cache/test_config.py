"""Settings of a build: refused by name before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from ddk_cache import BuildConfig, InputError
from ddk_cache.build.config import LARGEST_SHARD
from ddk_cache.console import field_texts


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"seq_len": 0}, "seq_len: got 0, expected a whole number from 1 to 16,777,216"),
        ({"seq_len": "16"}, "seq_len: got '16', expected a whole number"),
        ({"seq_len": True}, "seq_len: got True"),
        ({"batch_rows": 1.5}, "batch_rows: got 1.5"),
        ({"seed": 2**63}, "expected a whole number from 0 to 9,223,372,036,854,775,807"),
        ({"targets": 16}, "targets: got 16, expected text"),
        ({"targets": "topk:１２"}, "'topk:１２' need a size"),
        ({"targets": "sampled:1"}, "size of at least 2"),
        ({"temperatures": "2"}, "temperatures: got '2', expected numbers"),
        ({"temperatures": (2.0,)}, "temperatures can be declared for topk"),
        ({"targets": "topk:4", "temperatures": (1e9,)}, "0.01 to 100"),
        ({"holdout": 1.0}, "holdout"),
        ({"holdout": "a"}, "holdout"),
        ({"compression": "smal"}, "Did you mean 'small'"),
        ({"chunk_rows": 3, "shard_rows": 8}, "whole number of chunks"),
        ({"seq_len": 64, "shard_rows": 2**24}, "Give fewer --shard-rows"),
    ],
)
def test_wrong_settings_are_refused_by_name(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        BuildConfig(**setting)


@pytest.mark.parametrize("targets", ["topk:1", "sampled:16", "topk:2000"])
@pytest.mark.parametrize("seq_len", [1, 1000, 1024, 100_000])
def test_chunks_and_shards_have_about_their_tokens_and_fit_in_memory(
    targets: str, seq_len: int
) -> None:
    spec = BuildConfig(seq_len=seq_len, targets=targets).spec(32_000, {}, {})
    assert spec.shard_rows % spec.chunk_rows == 0
    assert spec.shard_rows * seq_len * spec.targets.size <= max(
        LARGEST_SHARD, spec.chunk_rows * seq_len * spec.targets.size
    )
    if targets == "sampled:16" and seq_len == 1024:
        assert (spec.chunk_rows, spec.shard_rows) == (4, 256)


def test_one_temperature_is_always_there_and_every_setting_is_described() -> None:
    config = BuildConfig(targets="topk:4", temperatures=(4, 1.0, 2.0, 2.0))
    assert config.spec(300, {}, {}).temperatures == (2.0, 4.0)
    assert set(field_texts(BuildConfig)) == set(BuildConfig.__dataclass_fields__)
