"""Exact pseudo-random integers: the same bits on every machine, with every library, forever.

The streams of library generators may change from release to release, while the draws of a cache
and the order of its rows must be reproducible years later; so they come from a few lines of
integer arithmetic. The trade-off is speed, which does not matter at a few numbers per position.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]


def key_of(*parts: object) -> int:
    """Return a 64-bit key of the parts, in order."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())


def scramble(values: Words, key: int) -> Words:
    """Return 64 well-mixed bits of each value and a key (the finalizer of SplitMix64)."""
    mixed = values + np.uint64(key * 0x9E3779B97F4A7C15 & (2**64 - 1))
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)


def uniform(values: Words, key: int) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) for each value and a key, a multiple of 2⁻⁵³."""
    mixed = scramble(scramble(values, key), key) >> np.uint64(11)
    return mixed.astype(np.float64) * 2.0**-53


ROUNDS = 6
"""Rounds of the Feistel network. Four give a pseudo-random permutation (Luby and Rackoff 1988)."""


def permute(index: Ints, size: int, key: int) -> Ints:
    """Map numbers below `size` one to one onto numbers below `size`, by `key`.

    A Feistel network on the next even number of bits; a value that falls outside is mapped
    again until it is inside (cycle walking), at most four times on average.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    values = index.astype(np.uint64)
    todo = np.ones(len(values), bool)
    while todo.any():
        left, right = values[todo] >> np.uint64(half), values[todo] & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (scramble(right, key + turn) & mask)
        values[todo] = left << np.uint64(half) | right
        todo[todo] = values[todo] >= size
    return values.astype(np.int64)
