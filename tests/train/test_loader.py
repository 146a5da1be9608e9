"""Batches: the same whatever reads them ahead, exactly resumable, never the wrong rows."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddk_cache import CorruptCacheError, open_cache
from ddk_cache.read.cache import Cache
from ddk_train.data.loader import Batch, Loader
from ddk_train.data.mixture import Floats, Mixture

CPU = torch.device("cpu")
STEPS = 24
READERS = [(0, 4), (1, 1), (1, 7), (4, 1), (4, 4), (4, 30)]
"""Threads and depth."""


def loader(cache: Cache, threads: int = 2, depth: int = 4, rows: int = 5) -> Loader:
    extents = {name: cache.extents(name, "train") for name in cache.domains}
    mixture = Mixture(extents, chunk_rows=cache.spec.chunk_rows, rows=rows, seed=3)
    return Loader(cache, mixture, CPU, threads=threads, depth=depth)


def content(batch: Batch) -> tuple[Any, ...]:
    """Return all that a step sees of a batch."""
    targets = batch.targets
    tensors = (batch.tokens, batch.loss_mask, targets.ids, targets.probs, targets.tail)
    draw = (batch.draw.domain.tolist(), batch.draw.row.tolist())
    return (*draw, batch.state, *(tensor.numpy().tobytes() for tensor in tensors))


def feedback(batch: Batch) -> Floats:
    """Return weights that follow from what was read."""
    seen = batch.tokens.sum(1).numpy() % 7
    raw = 1.0 + np.bincount(batch.draw.domain, seen, minlength=3)
    return np.asarray(raw / raw.sum())


def play(batches: Loader, first: int) -> list[tuple[str, Any]]:
    """Return state before and content of every step; weights change behind every fifth."""
    played = []
    for step in range(first, STEPS):
        state = json.dumps(batches.state_dict())
        batch = next(batches)
        played.append((state, content(batch)))
        if step % 5 == 4:
            batches.weights = feedback(batch)
    return played


@pytest.mark.parametrize(("threads", "depth"), READERS)
def test_every_state_goes_on_exactly_with_any_threads_and_depth(
    threads: int, depth: int, cache: Cache
) -> None:
    whole = play(loader(cache, 0), 0)
    assert play(loader(cache, threads, depth), 0) == whole
    for step, (state, _) in enumerate(whole):
        resumed = loader(cache, threads, depth)
        resumed.load_state_dict(json.loads(state))
        assert play(resumed, step) == whole[step:]


def test_weights_hold_from_the_very_next_batch(cache: Cache) -> None:
    batches = loader(cache, 2, 6)
    for number in range(3):
        batches.weights = np.eye(3)[number]
        drawn = [next(batches).draw.domain.tolist() for _ in range(2)]
        assert drawn == [[number] * 5] * 2


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({"targets": "topk:8", "temperatures": (2.0,)}, 1.0),
        ({"targets": "topk:8", "temperatures": (2.0,)}, 2.0),
        ({"targets": "sampled:6", "compression": "fast"}, 1.0),
        ({"targets": "sampled:300"}, 1.0),
    ],
)
def test_batches_are_the_rows_of_the_cache_decoded(
    settings: Any, temperature: float, make_cache: Any, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "mix.zarr", **settings)
    extents = {name: cache.extents(name, "train") for name in cache.domains}
    mixture = Mixture(extents, chunk_rows=cache.spec.chunk_rows, rows=5, seed=3)
    even = np.full(len(cache.domains), 1 / len(cache.domains))
    batches = Loader(cache, mixture, CPU, share=slice(1, None, 2), temperature=temperature)
    for batch in batches.batches(even, 9):
        np.testing.assert_array_equal(batch.counted, batch.loss_mask.sum(1))
        shared = zip(batch.draw.domain[1::2], batch.draw.row[1::2], strict=True)
        for place, (number, row) in enumerate(shared):
            name = cache.domains[number]
            rows = cache.read(name, "train", [row], temperature=temperature)
            np.testing.assert_array_equal(batch.tokens[place], rows.tokens[0])
            np.testing.assert_array_equal(batch.loss_mask[place], rows.loss_mask[0])
            found, wanted = batch.targets, rows.targets.map(lambda part: part[0])
            K = wanted.ids.shape[-1]  # of this row; the batch may be wider
            np.testing.assert_array_equal(found.ids[place, :, :K], wanted.ids)
            np.testing.assert_allclose(found.probs[place, :, :K], wanted.probs, rtol=2e-6)
            np.testing.assert_allclose(found.tail[place], wanted.tail, rtol=2e-6)
            assert (found.ids[place, :, K:] == -1).all()
            assert (found.probs[place, :, K:] == 0).all()


def test_a_batch_keeps_its_values_when_its_memory_is_used_again(cache: Cache) -> None:
    batches = loader(cache, 1, 1)
    held = [next(batches) for _ in range(8)]
    before = [content(batch) for batch in held]
    for _ in range(8):
        next(batches)
    assert [content(batch) for batch in held] == before


def test_a_domain_that_is_used_up_goes_on_in_another_order_and_says_so(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    batches, rows = loader(cache, 2, 4, rows=1), cache.plan("notes").rows("train")
    batches.weights = np.array([0.0, 0.0, 1.0])
    epochs = [[int(next(batches).draw.row[0]) for _ in range(rows)] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [cache.row_numbers("notes", "train").tolist()] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    said = caplog.messages
    assert [line.split(": ")[1] for line in said] == ["epoch 2, reordered", "epoch 3, reordered"]
    assert all("rows of notes are used" in line for line in said)


def test_what_cannot_be_read_is_said_by_the_step_that_needs_it(copied: Path) -> None:
    for path in (copied / "domains/letters/train/target_ids/c").glob("*/0/0"):
        path.write_bytes(path.read_bytes()[:-1])
    batches = loader(open_cache(copied), 3, 5)
    batches.weights = np.array([0.9, 0.1, 0.0])
    states: list[dict[str, Any]] = []
    with pytest.raises(CorruptCacheError, match="letters/train/target_ids"):
        states.extend(batch.state for batch in batches)
    assert batches.state_dict()["mixture"] == states[-1]


def test_the_data_loader_of_torch_refuses_it(cache: Cache) -> None:
    with pytest.raises(TypeError, match="'Loader' has no len"):
        iter(torch.utils.data.DataLoader(loader(cache), num_workers=2))  # type: ignore[arg-type]


def test_a_closed_loader_leaves_no_thread(cache: Cache) -> None:
    def readers() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if one.name.startswith("reader")}

    before, batches = readers(), loader(cache)
    next(batches)
    assert readers() > before
    batches.close()
    assert readers() <= before


# --- other people's checkpoints -------------------------------------------------------------------


def test_accelerate_checkpoints_it(cache: Cache, tmp_path: Path) -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    batches = loader(cache)
    accelerator.register_for_checkpointing(batches)
    for _ in range(4):
        next(batches)
    accelerator.save_state(str(tmp_path / "state"))
    rest = [content(next(batches)) for _ in range(6)]
    accelerator.load_state(str(tmp_path / "state"))
    assert [content(next(batches)) for _ in range(6)] == rest
