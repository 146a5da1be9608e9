"""Cross-entropy and divergence from sparse targets, position by position. Pure functions.

The mass that was not kept enters as one more bucket, so that the divergence is a proper KL of a
coarse-grained distribution: never negative, zero only where student and teacher agree on every
kept id and on the rest as a whole. Without the bucket the gradient would pull all kept ids up
for ever (M·q − t with M < 1; "Sparse Logit Sampling", arXiv 2503.16870).

Shape letters: P positions, K kept entries, V the student's vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ddk_cache import SparseTargets


def ce_and_kl(
    logits_PV: torch.Tensor, labels_P: torch.Tensor, targets: SparseTargets[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (P) cross-entropy with the label and (P) KL(teacher ‖ student), in nats.

    KL = Σ_K t log(t/q) + τ log(τ/(1 − Q)), τ the tail and Q the student's mass on the kept ids.
    The student's mass outside is summed over the logits outside, not taken as 1 − Q, and the
    same sum gives the normaliser: one pass over V in all, no cancellation, no clamp.
    """
    logits_PV = logits_PV.float()
    kept_PK = logits_PV.gather(-1, targets.ids)
    outside_P = logits_PV.scatter(-1, targets.ids, -torch.inf).logsumexp(-1)
    norm_P = torch.logaddexp(kept_PK.logsumexp(-1), outside_P)
    ce_P = norm_P - logits_PV.gather(-1, labels_P[:, None])[:, 0]
    logq_PK = kept_PK - norm_P[:, None]
    cross_PK = (targets.probs * logq_PK).where(targets.probs > 0, 0.0)  # 0 · log 0 = 0
    kept_P = (torch.xlogy(targets.probs, targets.probs) - cross_PK).sum(-1)
    return ce_P, kept_P + bucket(targets.tail, outside_P - norm_P)


def within(
    logits_PV: torch.Tensor, targets: SparseTargets[torch.Tensor]
) -> tuple[torch.Tensor, SparseTargets[torch.Tensor]]:
    """Return logits and targets of a student with fewer outputs than the teacher.

    Two heads over one tokenizer may be padded to different widths. What the teacher gave to ids
    that the student does not have goes to the tail; in their place stands one more output, V,
    that no one gives anything to.
    """
    V = logits_PV.shape[-1]
    beyond = targets.ids >= V
    tail = targets.tail + (targets.probs * beyond).sum(-1)
    ids, probs = targets.ids.masked_fill(beyond, V), targets.probs.masked_fill(beyond, 0.0)
    return pad(logits_PV, (0, 1), value=-torch.inf), SparseTargets(ids, probs, tail)


def bucket(tail_P: torch.Tensor, log_outside_P: torch.Tensor) -> torch.Tensor:
    """Return (P) τ log(τ/(1 − Q)), exactly zero, with no gradient, where τ is zero."""
    some_P = tail_P > 0
    safe_P = log_outside_P.where(some_P, 0.0)
    return torch.xlogy(tail_P, tail_P) - tail_P * safe_P
