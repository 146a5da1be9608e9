"""Exact pseudo-random integers: the same bits on every machine, with every library, for ever.

The streams of library generators may change from release to release, and what is drawn for a
cache or an order of data has to be made again years later; so it comes from a few lines of integer
arithmetic. The trade-off is speed, which does not matter at the few numbers a position.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

Words = npt.NDArray[np.uint64]


def key_of(*parts: object) -> int:
    """Return a 64-bit key of what is named."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())


def scramble(values: Words, key: int) -> Words:
    """Return 64 well-mixed bits of each value and a key (the finaliser of SplitMix64)."""
    mixed = values + np.uint64(key * 0x9E3779B97F4A7C15 & (2**64 - 1))
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)


def uniform(values: Words, key: int) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) for each value and a key, a multiple of 2⁻⁵³."""
    mixed = scramble(scramble(values, key), key) >> np.uint64(11)
    return mixed.astype(np.float64) * 2.0**-53
