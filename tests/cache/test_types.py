"""What a cache hands over."""

from __future__ import annotations

import numpy as np

from ddk_cache import SPLITS, TRAIN, VALIDATION, SparseTargets


def test_a_function_is_applied_to_each_array() -> None:
    targets = SparseTargets(np.arange(6).reshape(2, 3), np.ones((2, 3)), np.zeros(2))
    first = targets.map(lambda array: array[0])
    assert first.ids.tolist() == [0, 1, 2]
    assert first.probs.shape == (3,)
    assert first.tail == 0
    assert targets.map(len) == SparseTargets(2, 2, 2)


def test_the_splits_have_names() -> None:
    assert SPLITS == (TRAIN, VALIDATION) == ("train", "validation")
