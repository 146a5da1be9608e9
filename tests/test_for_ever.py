"""A cache of format version 1, kept: it must open, verify and read the same for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddk_cache import open_cache
from ddk_cache.verify import verify

CACHE = Path(__file__).parent / "data" / "v1.zarr"


def test_version_1_opens_verifies_and_reads() -> None:
    cache = open_cache(CACHE)
    assert not verify(cache, lambda _: None)
    assert cache.spec.fingerprint == FINGERPRINT
    rows = cache.read("some", "train", cache.row_numbers("some", "train"))
    np.testing.assert_array_equal(rows.tokens[0], FIRST_TOKENS)
    np.testing.assert_array_equal(rows.targets.ids[0, 0], FIRST_IDS)
    np.testing.assert_allclose(rows.targets.probs[0, 0], FIRST_PROBS, rtol=1e-6)
    np.testing.assert_allclose(rows.targets.tail[0, 0], FIRST_TAIL, rtol=1e-6)
    assert rows.label_logprob.sum(dtype=np.float64) == pytest.approx(LABEL_SUM, rel=1e-9)


FINGERPRINT = "28a1089e19f380722f4152b321d154bf"
FIRST_TOKENS = [68, 79, 67, 85, 77, 69, 78, 84, 221, 16, 221, 79, 70, 221, 83, 79, 77]
FIRST_IDS = [61, 25, 95, 217]
FIRST_PROBS = [0.9080772399902344, 0.03962631896138191, 0.012003012001514435, 0.008265669457614422]
FIRST_TAIL = 0.03202775493264198
LABEL_SUM = -4598.30859375
