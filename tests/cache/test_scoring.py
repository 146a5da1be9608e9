"""The teacher over a shard: draws follow the row, whatever the batch; axes are as stored."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ddk_cache import BuildConfig, InputError, Teacher
from ddk_cache.build.scoring import Scorer, draws, labels_inside, rows_that_fit
from ddk_cache.format.plan import ShardKey
from ddk_cache.testing import VOCAB, random_teacher

KEY = ShardKey("web", "train", 3)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (7, 17))


@pytest.mark.parametrize("targets", ["sampled:6", "topk:6"])
def test_scores_do_not_depend_on_the_batch(targets: str) -> None:
    config = BuildConfig(
        seq_len=16, targets=targets, temperatures=(2.0, 4.0) if "topk" in targets else ()
    )
    teacher = random_teacher()
    spec = config.spec(VOCAB, teacher.identity, {})
    seen: list[int] = []
    one = Scorer(teacher, spec, 7).score(KEY, TOKENS, seen.append)
    other = Scorer(teacher, spec, 2).score(KEY, TOKENS, seen.append)
    assert seen == [7 * 16, 32, 32, 32, 16]
    for name, array in one.arrays.items():
        np.testing.assert_allclose(array, other.arrays[name], rtol=1e-5)
    assert one.fidelity.keys() == other.fidelity.keys()
    temperatures = len(config.temperatures)
    assert one.arrays["tempered_tail_logprob"].shape == (7, temperatures, 16)
    assert one.arrays["ids"].shape == one.arrays["logprobs"].shape == (7, 16, 6)
    shard = Scorer(teacher, spec, 7).score(KEY._replace(number=4), TOKENS, seen.append)
    assert (one.arrays["ids"] == shard.arrays["ids"]).all() == (targets == "topk:6")


@pytest.mark.parametrize("targets", ["sampled:6", "topk:6"])
def test_a_position_without_a_label_of_its_document_is_certain_and_not_compared(
    targets: str,
) -> None:
    temperatures = (2.0,) if "topk" in targets else ()
    spec = BuildConfig(seq_len=16, targets=targets, temperatures=temperatures).spec(VOCAB, {}, {})
    segments = np.repeat([[1, 2, 3, 0]], 7, 0).repeat([1, 6, 8, 2], 1)
    scored = Scorer(random_teacher(), spec, 3).score(KEY, TOKENS, lambda _: None, segments)
    plain = Scorer(random_teacher(), spec, 3).score(KEY, TOKENS, lambda _: None).arrays
    outside = [0, 6, 14, 15]
    inside = [s for s in range(16) if s not in outside]
    for name, array in scored.arrays.items():
        if name != "tempered_tail_logprob":
            np.testing.assert_array_equal(array[:, inside], plain[name][:, inside])
    assert (scored.arrays["ids"][:, outside, 0] == TOKENS[:, 1:][:, outside]).all()
    assert (scored.arrays["ids"][:, outside, 1:] == -1).all()
    assert (scored.arrays["label_logprob"][:, outside] == 0).all()
    assert np.isneginf(scored.arrays["tail_logprob"][:, outside]).all()
    assert np.isneginf(scored.arrays["tempered_tail_logprob"][..., outside]).all()
    assert scored.fidelity["positions"] == 7
    for first in range(40):
        _, chosen = draws(spec, KEY, first, labels_inside(TOKENS, segments))
        assert set(chosen.tolist()) <= set(inside)


def test_a_shard_may_begin_before_the_one_before_it_is_finished() -> None:
    teacher = random_teacher()
    spec = BuildConfig(seq_len=16, targets="sampled:6").spec(VOCAB, teacher.identity, {})
    keys, tokens = [KEY, KEY._replace(number=4)], [TOKENS, TOKENS[::-1].copy()]
    scorer = Scorer(teacher, spec, 3)
    alone = [scorer.score(*pair, lambda _: None) for pair in zip(keys, tokens, strict=True)]
    begun = [scorer.begin(*pair, lambda _: None) for pair in zip(keys, tokens, strict=True)]
    with ThreadPoolExecutor(1) as other:
        behind = list(other.map(lambda finish: finish(), begun))
    for one, late in zip(alone, behind, strict=True):
        assert one.fidelity == late.fidelity
        assert one.fidelity["positions"] == 7
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(array, late.arrays[name])


def test_what_is_not_logits_is_an_input_error() -> None:
    teacher = Teacher(lambda tokens: torch.zeros(1), VOCAB, {})
    spec = BuildConfig(seq_len=16).spec(VOCAB, {}, {})
    with pytest.raises(InputError, match=r"shape \(1,\), expected .* \(2, 16, 300\)"):
        Scorer(teacher, spec, 2).score(KEY, TOKENS, lambda _: None)


def test_rows_that_fit_follow_the_vocabulary() -> None:
    spec = BuildConfig().spec(32_000, {}, {})
    wide = dataclasses.replace(spec, vocab_size=256_000)
    assert rows_that_fit(random_teacher(), spec) == 2
    assert rows_that_fit(random_teacher(), wide) == 1
