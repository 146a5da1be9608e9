"""What the stored targets lose, measured on full distributions while they are still there.

At a few positions of every shard the whole distribution is compared with what a reader of the
cache will get. The mass outside of the kept ids counts as spread evenly over all other ids, as it
is for a fresh student, which gives every id the same probability. The figures are sums over
positions, so that those of several shards add up.
"""

from __future__ import annotations

import torch

from ddk_cache.types import SparseTargets


def compare(
    logits_NV: torch.Tensor, stored: SparseTargets[torch.Tensor], *, sampled: bool
) -> dict[str, float]:
    """Return sums over N positions of what `stored` (N, K) loses of the teacher's distribution t.

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
    return {
        "positions": float(N),
        "kl": 0.0 if sampled else float(kl_N.sum()),
        "total_variation": float((t_NV - s_NV).abs().sum() / 2),
        "tail": float(N - (t_NV.gather(-1, ids_NK) * kept_NK).sum()),
        "gradient_error": float(error_N.sum()),
    }
