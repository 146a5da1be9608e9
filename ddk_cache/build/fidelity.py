"""What the stored targets lose, measured on full distributions while they are still there.

At a few positions of every shard the whole distribution is compared with what a reader of the
cache will get. The mass outside of the kept ids counts as spread evenly over all other ids, as it
is for a fresh student, which gives every id the same probability. The figures are sums over
positions, so that those of several shards add up. They stay on the device, because a build that
asked for each of them would wait for the teacher's next batch.
"""

from __future__ import annotations

import torch

from ddk_cache.types import SparseTargets

FIGURES = ("positions", "kl", "total_variation", "tail", "gradient_error")
"""The names of what `compare` returns."""


def compare(
    logits_NV: torch.Tensor, stored: SparseTargets[torch.Tensor], *, sampled: bool
) -> torch.Tensor:
    """Return sums over N positions of what `stored` (N, K) loses of the teacher's distribution t.

    They are float64, on the device of the logits, in the order of `FIGURES`.

    `kl`: KL(t ‖ stored), nats; 0 for sampled targets, whose zeros mean "not drawn".
    `total_variation`: ½ Σ |t − stored|. `tail`: the mass of t outside of the kept ids.
    `gradient_error`: ‖ĝ − g‖² / ‖g‖² of the gradient q − t in the logits of a student with even q;
    it has no bound where t is even too, because g vanishes.
    """
    t_NV = logits_NV.double().softmax(-1)
    N, V = t_NV.shape
    kept_NK = stored.ids >= 0
    outside_N = (V - kept_NK.sum(-1)).clamp(min=1)
    # What is padding repeats the first entry.
    ids_NK = stored.ids.where(kept_NK, stored.ids[:, :1])
    probs_NK = stored.probs.where(kept_NK, stored.probs[:, :1]).double()
    s_NV = (stored.tail.double() / outside_N)[:, None].expand(N, V).scatter(-1, ids_NK, probs_NK)
    error_N = ((t_NV - s_NV) ** 2).sum(-1) / ((1 / V - t_NV) ** 2).sum(-1).clamp(min=1e-30)
    # A probability below what a byte can store does not hold the student to zero.
    kl_N = torch.xlogy(t_NV, t_NV) - torch.xlogy(t_NV, s_NV.clamp(min=1e-12))
    figures = {
        "positions": t_NV.new_tensor(N),
        "kl": kl_N.sum() * (not sampled),
        "total_variation": (t_NV - s_NV).abs().sum() / 2,
        "tail": N - (t_NV.gather(-1, ids_NK) * kept_NK).sum(),
        "gradient_error": error_N.sum(),
    }
    return torch.stack([figures[name] for name in FIGURES])
