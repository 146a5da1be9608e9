"""The write-time audit: a distribution, stored as it was computed, and what was seen of it.

It runs on each shard before it is committed. A breach stops the build; what was seen goes into
the shard's record as counts and sums, which add up over shards without opening an array. The
entropy is that of the kept entries with the tail as one more: a lower bound of the teacher's own,
which would cost another pass over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddk_cache.errors import CacheError
from ddk_cache.format.audit_summary import MASS_BINS
from ddk_cache.format.codec import REST, LogprobCodec, TargetCodec
from ddk_cache.types import DRAWN_PROB, Array

SLACK = 1e-3
"""Nats by which rounding in the teacher's arithmetic may put a log-probability above 0."""


def audit(
    where: str,
    scores: Mapping[str, Array],
    stored: Mapping[str, Array],
    labels: Array,
    codec: TargetCodec,
    seen: Any = ...,
) -> dict[str, Any]:
    """Check the scores of a shard and return what was seen.

    `where` names the shard in messages, `scores` are the arrays of `Scorer.score`, `stored` is
    what will be written of them, and `labels` (R, S) are the true next tokens. The statistics are
    those of the positions that the index `seen` of (R, S) selects.

    Raises:
        CacheError: the scores are not a distribution, or not what will be stored.
    """
    ids, logprobs = scores["ids"], scores["logprobs"]
    tail, label = scores["tail_logprob"], scores["label_logprob"]
    numbers = ~np.isnan(logprobs).any(-1) & np.isfinite(label) & ~np.isnan(tail)
    if codec.spec.teacher.get("dtype", "float32") == "float32":
        advice = "Check the teacher's weights and logits."
    else:
        advice = "A wider dtype may help: --dtype float32, with another path for the cache."
    _require(where, "log-probabilities are not finite", numbers, advice=advice)
    probs = np.exp(logprobs)
    kept, rest = probs.sum(-1, dtype=np.float64), np.exp(tail.astype(np.float64))
    top = np.maximum(np.maximum(logprobs[..., 0], label), tail)
    _require(where, "a probability is above one", np.asarray(top <= SLACK), np.exp(top))
    sums = np.asarray(np.abs(kept + rest - 1) < 5 * SLACK)
    _require(where, "kept entries and tail do not sum to one", sums, kept)
    in_range = (ids.min(-1) >= -1) & (ids[..., 0] >= 0) & (ids.max(-1) < codec.spec.vocab_size)
    _require(where, "an id is outside of the vocabulary", in_range, ids.max(-1))
    ranked = np.sort(ids, -1)
    twice = (ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] >= 0)
    _require(where, "an id is kept twice", ~twice.any(-1))
    falling = np.asarray(probs[..., 1:] <= probs[..., :-1])
    _require(where, "entries are not in order", np.asarray(falling.all(-1)))
    errors = _stored_as_computed(where, scores, stored, labels, codec)
    mass = np.clip(kept, 0, 1)
    with np.errstate(invalid="ignore"):
        nats = np.where(probs > 0, probs * logprobs, 0.0)
    entropy = -nats.sum(-1, dtype=np.float64) - rest * np.where(rest > 0, tail, 0.0)
    return {
        "positions": int(label[seen].size),
        "correct": int((ids[..., 0] == labels)[seen].sum()),
        "entropy": float(entropy[seen].sum()),
        "kept_mass": float(mass[seen].sum()),
        "kept_mass_bins": np.histogram(mass[seen], MASS_BINS, (0, 1))[0].tolist(),
        **errors,
    }


def _stored_as_computed(
    where: str,
    scores: Mapping[str, Array],
    stored: Mapping[str, Array],
    labels: Array,
    codec: TargetCodec,
) -> dict[str, float]:
    """Decode what will be written and compare it; return the largest errors.

    An entry may be off by its own rounding. What the others leave of one may be off by the rounding
    of all the others: it is one entry, or an equal share for each drawn entry.
    """
    error = 0.0
    for name in scores.keys() & stored.keys():
        nats = _error(scores[name], stored[name], codec.logprob)
        error = max(error, float(nats.max(initial=0)))
        good = nats <= codec.logprob.error + SLACK
        _require(where, f"stored {name} differ from the computed", good, nats)
    tokens = np.concatenate([labels[:, :1], labels], 1)  # the first token is never used
    found = codec.targets({**stored, "tokens": tokens})
    ids, probs, bound = _computed(scores, stored, codec)
    order, theirs = np.argsort(ids, -1), np.argsort(found.ids, -1)
    ids, probs, bound = (np.take_along_axis(part, order, -1) for part in (ids, probs, bound))
    K = found.ids.shape[-1]  # the others are padding, which comes first in this order
    same = (ids[..., -K:] == np.take_along_axis(found.ids, theirs, -1)).all(-1)
    same &= (ids[..., :-K] < 0).all(-1)
    _require(where, "stored entries differ from the computed", same)
    probs, bound = probs[..., -K:], bound[..., -K:]
    off = np.abs(np.take_along_axis(found.probs, theirs, -1) - probs)
    total = bound.sum(-1, keepdims=True)
    good = off <= bound + probs * total + SLACK
    good = (good.sum(-1) >= K - 1) & (off <= total + SLACK).all(-1)
    _require(where, "stored probabilities differ from the computed", good, off.max(-1))
    return {"largest_error": error, "largest_prob_error": float(off.max())}


def _computed(
    scores: Mapping[str, Array], stored: Mapping[str, Array], codec: TargetCodec
) -> tuple[Array, Array, Array]:
    """Return ids, probabilities and how far rounding may move each, (R, S, K)."""
    ids, probs = scores["ids"], np.exp(scores["logprobs"])
    bound = np.where(probs > 0, codec.prob.error(probs), 0.0)
    if codec.sampled:
        drawn = (ids >= 0) & (probs == 0)
        count = np.maximum(drawn.sum(-1), 1)
        share = np.exp(scores["tail_logprob"]) / count
        rest = bound.sum(-1) / count
        shared = stored["position_fields"][:, DRAWN_PROB] == REST
        off = np.where(shared, rest, codec.drawn.error * share)
        probs = np.where(drawn, share[..., None], probs)
        bound = np.where(drawn, off[..., None], bound)
    return ids, probs, bound


def _require(
    where: str, what: str, good: Array, figure: Array | None = None, advice: str = ""
) -> None:
    if good.all():
        return
    bad = ~good.reshape(len(good), -1).all(-1)
    rows = np.flatnonzero(bad)
    worst = "" if figure is None else f", for example {figure[~good].flat[0]:.6g}"
    places = "1 place" if (~good).sum() == 1 else f"{int((~good).sum()):,} places"
    raise CacheError(
        f"{what} at {places} of {where} (rows {rows[0]}–{rows[-1]} of it{worst}). Nothing of it "
        f"was committed. {advice}".rstrip()
    )


def _error(computed: Array, stored: Array, codec: LogprobCodec) -> Array:
    """Return |stored − computed| in nats; what lies below the codec's floor may go to the floor."""
    decoded = codec.decode(stored)
    with np.errstate(invalid="ignore"):
        off = np.abs(decoded - np.clip(computed, codec.floor, 0))
    off[np.isneginf(computed) & np.isneginf(decoded)] = 0.0
    return np.asarray(off)
