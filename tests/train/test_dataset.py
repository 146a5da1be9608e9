"""CacheDataset: every row once and in order, with workers, ranks, resume and new weights."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ddk_cache import InputError, MismatchError
from ddk_cache.read.cache import Cache
from ddk_train.data.dataset import CacheDataset
from ddk_train.data.loader import Loader
from ddk_train.data.mixture import Mixture

Batch = dict[str, torch.Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")


def dataset(cache: Cache, rows: int = 6, **settings: Any) -> CacheDataset:
    return CacheDataset(cache.root, rows=rows, **{"seed": 3} | settings)


def content(batch: Batch) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def rows_of(batches: Iterable[Batch]) -> list[tuple[int, int]]:
    pairs = [(batch["domain"].tolist(), batch["row"].tolist()) for batch in batches]
    return [pair for domains, rows in pairs for pair in zip(domains, rows, strict=True)]


def every_row(cache: Cache, split: str = "train") -> list[tuple[int, int]]:
    names = [name for name in cache.domains if cache.plan(name).rows(split)]
    return [(n, row) for n, d in enumerate(names) for row in cache.row_numbers(d, split).tolist()]


def workers(data: CacheDataset, count: int, context: str = "fork") -> DataLoader[Batch]:
    return DataLoader(data, batch_size=None, num_workers=count, multiprocessing_context=context)


def test_a_batch_is_the_rows_of_the_cache(cache: Cache) -> None:
    for batch in islice(dataset(cache), 4):
        for n, (domain, row) in enumerate(rows_of([batch])):
            rows = cache.read(cache.domains[domain], "train", [row])
            mask = rows.loss_mask[0]
            assert batch["input_ids"][n].tolist() == rows.tokens[0].tolist()
            assert batch["labels"][n, 0] == -100
            wanted = np.where(mask, rows.tokens[0, 1:], -100)
            assert batch["labels"][n, 1:].tolist() == wanted.tolist()
            assert batch["target_ids"][n].tolist() == rows.targets.ids[0].tolist()
            np.testing.assert_allclose(batch["target_probs"][n], rows.targets.probs[0], rtol=2e-6)
            np.testing.assert_allclose(batch["target_tail"][n], rows.targets.tail[0], rtol=2e-6)


def test_the_order_is_that_of_the_loader(cache: Cache) -> None:
    extents = {name: cache.extents(name, "train") for name in cache.domains}
    mixture = Mixture(extents, chunk_rows=cache.spec.chunk_rows, rows=6, seed=3)
    loader = Loader(cache, mixture, torch.device("cpu"), threads=0)
    data = dataset(cache, weights="proportional")
    for wanted, found in zip(islice(loader, 8), data, strict=False):
        assert wanted.tokens.equal(found["input_ids"])
        assert wanted.targets.probs.equal(found["target_probs"])


@pytest.mark.parametrize(
    ("count", "context"), [(1, "fork"), (2, "fork"), (3, "fork"), (2, "spawn")]
)
def test_workers_give_the_batches_of_one_process(count: int, context: str, cache: Cache) -> None:
    data = dataset(cache, weights="proportional", epochs=1)
    whole = [content(batch) for batch in data]
    assert [content(batch) for batch in workers(data, count, context)] == whole


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("count", [0, 2])
def test_an_epoch_has_every_row_exactly_once_over_ranks_and_workers(
    split: str, count: int, cache: Cache
) -> None:
    settings: dict[str, Any] = {"weights": "proportional", "epochs": 1, "split": split, "world": 3}
    ranks = [dataset(cache, rank=rank, **settings) for rank in range(3)]
    found = [rows_of(workers(data, count) if count else data) for data in ranks]
    assert sorted(pair for rows in found for pair in rows) == every_row(cache, split)


def test_ranks_share_the_rows_of_one_process(cache: Cache) -> None:
    whole = rows_of(islice(dataset(cache), 5))
    shares = [rows_of(islice(dataset(cache, rank=rank, world=2), 5)) for rank in range(2)]
    assert [whole[0::2], whole[1::2]] == shares


def test_rank_and_world_come_from_the_launcher(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = dataset(cache)
    assert (data.rank, data.world) == (1, 2)


# --- resume ---------------------------------------------------------------------------------------


def played(data: CacheDataset, first: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the state before and content of each batch to the tenth; weights move often."""
    found, batches = [], iter(data)
    for number in range(first, 10):
        if number % 3 == 2:
            data.set_weights([1.0, 1.0 + number, 2.0])
        state = json.dumps(data.state_dict())
        found.append((state, content(next(batches))))
    return found


def test_every_position_resumes_exactly(cache: Cache) -> None:
    whole = played(dataset(cache), 0)
    for number, (state, _) in enumerate(whole):
        resumed = dataset(cache)
        resumed.load_state_dict(json.loads(state))
        assert [batch for _, batch in played(resumed, number)] == [b for _, b in whole[number:]]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("consumed", [1, 4, 5])
def test_a_position_by_number_resumes_with_any_workers(
    consumed: int, count: int, cache: Cache
) -> None:
    data = dataset(cache)
    data.set_weights([0.2, 0.3, 0.5], at=3)
    whole = [content(batch) for batch in islice(data, 12)]
    state = json.loads(json.dumps(data.state_dict(consumed)))
    resumed = dataset(cache)
    resumed.load_state_dict(state)
    source: Iterable[Batch] = workers(resumed, count) if count else resumed
    assert [content(batch) for batch in islice(source, 12 - consumed)] == whole[consumed:]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("consumed", [4, 5])
def test_the_stateful_data_loader_of_torchdata_resumes_it(
    consumed: int, count: int, cache: Cache
) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    whole = [content(batch) for batch in islice(dataset(cache), 12)]
    first = stateful(dataset(cache), batch_size=None, num_workers=count)
    found = [content(batch) for batch in islice(first, consumed)]
    second = stateful(dataset(cache), batch_size=None, num_workers=count)
    second.load_state_dict(first.state_dict())
    found += [content(batch) for batch in islice(second, 12 - consumed)]
    assert found == whole


def test_accelerate_checkpoints_it(cache: Cache, tmp_path: Path) -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    data = dataset(cache)
    accelerator.register_for_checkpointing(data)
    whole = [content(batch) for batch in islice(data, 4)]
    accelerator.save_state(str(tmp_path / "state"))
    whole += [content(batch) for batch in islice(dataset(cache), 4, 10)]
    accelerator.load_state(str(tmp_path / "state"))
    assert [content(batch) for batch in islice(data, 6)] == whole[4:]


def test_a_position_of_another_order_is_refused(cache: Cache) -> None:
    state = dataset(cache).state_dict()
    with pytest.raises(MismatchError, match="'seed': 3"):
        dataset(cache, seed=4).load_state_dict(state)


# --- weights that move ----------------------------------------------------------------------------


def test_new_weights_hold_from_the_next_batch(cache: Cache) -> None:
    data = dataset(cache)
    batches = iter(data)
    for number, name in enumerate(data.domains):
        data.set_weights({other: float(other == name) for other in data.domains})
        assert [next(batches)["domain"].tolist() for _ in range(2)] == [[number] * 6] * 2
    assert data.weights == {"digits": 0.0, "letters": 0.0, "notes": 1.0}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_with_workers_new_weights_hold_from_the_agreed_batch(count: int, cache: Cache) -> None:
    def run(workers_: int) -> list[dict[str, Any]]:
        data, found = dataset(cache), []
        source: Iterable[Batch] = workers(data, workers_) if workers_ else data
        for number, batch in enumerate(islice(source, 20)):
            found.append(content(batch))
            if number in (2, 5):
                weights = [0.7, 0.2, 0.1] if number == 2 else [0.0, 0.5, 0.5]
                data.set_weights(weights, at=number + 1 + 2 * count)
        return found

    assert run(count) == run(0)


def test_weights_that_come_too_late_are_refused(cache: Cache) -> None:
    data = dataset(cache)
    batches = iter(workers(data, 2))
    for _ in range(4):
        next(batches)
    with pytest.raises(InputError, match="Give at="):
        data.set_weights("proportional")
    with pytest.raises(InputError, match="got at=2, expected a batch from"):
        data.set_weights("proportional", at=2)
    del batches


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("excess", "set_weights"),
        ("unifrom", "Did you mean 'uniform'"),
        ({"digits": 1.0}, "expected digits, letters, notes"),
        ([1.0, 2.0], "expected 3 numbers"),
        ([1.0, -1.0, 1.0], "none below 0"),
        ([0.0, 0.0, 0.0], "all are 0"),
    ],
)
def test_wrong_weights_are_named(weights: Any, message: str, cache: Cache) -> None:
    with pytest.raises(InputError, match=message):
        dataset(cache, weights=weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "unknown split 'test'"),
        ({"rows": 0}, "rows: got 0"),
        ({"rank": 0, "world": 4}, "multiple of the 4 processes"),
    ],
)
def test_wrong_settings_are_named(settings: Any, message: str, cache: Cache) -> None:
    with pytest.raises(InputError, match=message):
        dataset(cache, **settings)


def test_it_pickles_by_path(cache: Cache) -> None:
    data = dataset(cache)
    copy = pickle.loads(pickle.dumps(data))
    assert rows_of(islice(copy, 3)) == rows_of(islice(data, 3))
