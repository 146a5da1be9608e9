"""What a shard has to be before it is committed: a distribution, stored as computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ddk_cache import CacheError
from ddk_cache.build.audit import audit
from ddk_cache.build.scoring import as_arrays
from ddk_cache.build.targets import extract
from ddk_cache.format.codec import REST, TargetCodec
from ddk_cache.read.cache import Cache
from ddk_cache.types import DRAWN_PROB
from tests.helpers import make_spec


def scores() -> dict[str, Any]:
    """Return honest scores of 2 rows of 3 positions with 2 entries of 4 ids."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    shape = (2, 3, 2)
    return {
        "ids": np.broadcast_to([2, 0], shape).copy(),
        "logprobs": np.broadcast_to(np.log(p[:2]), shape).astype(np.float32),
        "tail_logprob": np.full((2, 3), np.log(0.2), np.float32),
        "label_logprob": np.full((2, 3), np.log(0.5), np.float32),
    }


def run_audit(cache: Cache, given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    codec, labels = TargetCodec(cache.spec), np.full((2, 3), 2)
    encoded = codec.encode(scores() | {"logprobs": given["logprobs"]}, labels) | changes
    return audit("web/train/7", given, encoded, labels, codec)


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
    with pytest.raises(CacheError, match="stored label_logprob differ from the computed"):
        run_audit(cache, scores(), label_logprob=np.full((2, 3), 7, np.uint16))
    width = 3 * cache.spec.targets.size
    changes: list[dict[str, Any]] = [
        {"target_ids": np.ones((2, 2, width), np.uint8)},
        {"position_fields": np.zeros((2, 2, 3), np.uint8)},
        {"position_fields": np.tile(np.array([[0], [2]], np.uint8), (2, 1, 3))},
    ]
    for change in changes:
        with pytest.raises(CacheError, match="stored entries differ"):
            run_audit(cache, scores(), **change)
    with pytest.raises(CacheError, match="stored probabilities differ"):
        run_audit(cache, scores(), target_probs=np.full((2, width), 128, np.uint8))


def test_drawn_entries_that_share_the_rounding_of_many_pass() -> None:
    """Ten equal entries are rounded the same way, and two drawn ones are what they leave of one."""
    spec = make_spec(targets="sampled:12", seq_len=1, vocab_size=30)
    probs = torch.tensor(10 * [0.0905] + 20 * [0.00475])
    labels = torch.tensor([[29]])
    found = as_arrays([extract(probs.log()[None, None], labels, spec.targets)])
    codec = TargetCodec(spec)
    stored = codec.encode(found, labels.numpy())
    assert stored["position_fields"][:, DRAWN_PROB] == REST
    seen = audit("web/train/7", found, stored, labels.numpy(), codec)
    assert seen["largest_prob_error"] > 0.005
