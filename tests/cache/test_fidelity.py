"""What stored targets lose, against a dense reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddk_cache.build import targets
from ddk_cache.build.fidelity import FIGURES, compare
from ddk_cache.format.spec import TargetSpec
from tests.helpers import sharp


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_what_is_lost_agrees_with_a_dense_reference(kind: str) -> None:
    logits = sharp(60, 8)
    spec = TargetSpec(kind, 7, 0.99)
    scores = targets.extract(logits[None], torch.zeros(1, 8, dtype=torch.long), spec)
    assert (scores.ids < 0).any()  # some positions need fewer entries
    stored = scores.targets(kind).map(lambda part: part[0])
    sums = compare(logits, stored, sampled=kind == "sampled")
    found = dict(zip(FIGURES, sums.tolist(), strict=True))
    kl = variation = tail = error = 0.0
    for row in range(8):
        t = np.exp(logits[row].double().numpy())
        t /= t.sum()
        kept = stored.ids[row] >= 0
        ids = stored.ids[row][kept]
        s = np.full(60, stored.tail[row].item() / (60 - len(ids)))
        s[ids] = stored.probs[row][kept]
        kl += sum(t * np.log(t / s)) if kind == "topk" else 0.0
        variation += sum(abs(t - s)) / 2
        tail += 1 - t[ids].sum()
        error += sum((t - s) ** 2) / sum((1 / 60 - t) ** 2)
    wanted = {"positions": 8, "kl": kl, "total_variation": variation, "tail": tail}
    for name, value in (wanted | {"gradient_error": error}).items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
