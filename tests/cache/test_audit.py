"""What a shard has to be before it is committed: a distribution, stored as computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddk_cache import CacheError
from ddk_cache.build.audit import audit
from ddk_cache.format.codec import TargetCodec
from ddk_cache.read.cache import Cache


def scores() -> dict[str, Any]:
    """Return honest scores of 2 rows of 3 positions with 2 entries of 4 ids."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    shape = (2, 3, 2)
    return {
        "ids": np.broadcast_to([2, 0], shape).copy(),
        "logprobs": np.broadcast_to(np.log(p[:2]), shape).astype(np.float32),
        "tail_logprob": np.full((2, 3), np.log(0.2), np.float32),
        "label_logprob": np.full((2, 3), np.log(0.05), np.float32),
    }


def run_audit(cache: Cache, given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    codec = TargetCodec(cache.spec)
    encoded = codec.encode(scores() | {"logprobs": given["logprobs"]}) | changes
    return audit("web/train/7", given, encoded, np.full((2, 3), 2), codec)


def test_an_honest_shard_passes_and_says_what_was_seen(cache: Cache) -> None:
    seen = run_audit(cache, scores())
    assert seen["positions"] == seen["correct"] == 6
    assert seen["kept_mass"] == pytest.approx(6 * 0.8, rel=1e-6)
    entropy = -(0.5 * np.log(0.5) + 0.3 * np.log(0.3) + 0.2 * np.log(0.2))
    assert seen["entropy"] == pytest.approx(6 * entropy, rel=1e-6)
    assert seen["largest_error"] <= cache.logprob.error + 1e-6
    assert sum(seen["kept_mass_bins"]) == 6


def lie(name: str, value: float) -> dict[str, Any]:
    given = scores()
    given[name][1, 2, ...] = value
    return given


LIES = {
    "not finite": lie("logprobs", np.nan),
    "above one": lie("label_logprob", 0.1),
    "do not sum to one": lie("tail_logprob", np.log(0.4)),
    "outside of the vocabulary": lie("ids", 300),
    "kept twice": lie("ids", 1),
}


@pytest.mark.parametrize("said", LIES)
def test_a_shard_that_is_no_distribution_is_refused_by_name(said: str, cache: Cache) -> None:
    with pytest.raises(CacheError, match=rf"{said}.* of web/train/7 \(rows 1–1"):
        run_audit(cache, LIES[said])


def test_disorder_and_a_wrong_encoding_are_refused(cache: Cache) -> None:
    given = scores()
    given["logprobs"] = given["logprobs"][..., ::-1].copy()
    with pytest.raises(CacheError, match="not in order"):
        run_audit(cache, given)
    with pytest.raises(CacheError, match="stored tail_logprob differ from the computed"):
        run_audit(cache, scores(), tail_logprob=np.full((2, 3), 7, np.uint16))
    with pytest.raises(CacheError, match="stored entries differ"):
        run_audit(cache, scores(), target_ids=np.zeros((2, 2, 3, 2), np.uint8))
    with pytest.raises(CacheError, match="stored entries differ"):
        run_audit(cache, scores(), target_probs=np.zeros((2, 3, 2), np.uint8))
