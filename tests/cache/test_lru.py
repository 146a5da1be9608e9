"""Values that are made once, however many threads ask."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from ddk_cache.read.lru import LRU


def test_every_value_is_made_once_for_all_threads() -> None:
    made: Counter[int] = Counter()

    def make(keys: Sequence[int]) -> Iterator[int]:
        for key in keys:
            made[key] += 1
            time.sleep(0.001)
            yield key * key

    kept, wrong = LRU(100, make), []

    def ask(seed: int) -> None:
        for keys in np.random.default_rng(seed).integers(0, 40, (20, 5)).tolist():
            if kept(keys) != [key * key for key in keys]:
                wrong.append(keys)

    threads = [threading.Thread(target=ask, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(made.values()) == {1}


def test_what_is_missing_is_made_together_and_the_oldest_goes() -> None:
    asked: list[list[int]] = []

    def make(keys: Sequence[int]) -> Sequence[int]:
        asked.append(list(keys))
        return keys

    kept = LRU(3, make)
    assert kept([1, 2, 1]) == [1, 2, 1]
    assert kept([2, 3, 1]) == [2, 3, 1]
    assert kept([4, 5, 6, 7]) == [4, 5, 6, 7]
    kept([6, 4])
    assert asked == [[1, 2], [3], [4, 5, 6, 7], [4]]


def test_an_error_is_raised_and_not_kept() -> None:
    broken = True

    def make(keys: Sequence[int]) -> Iterator[int]:
        for key in keys:
            if broken and key == 2:
                raise OSError("gone")
            yield key

    kept = LRU(10, make)
    with pytest.raises(OSError, match="gone"):
        kept([1, 2])
    broken = False
    assert kept([1, 2]) == [1, 2]
