"""A cache as a dataset of torch, for any training loop: batches as plain dicts of tensors.

    data = CacheDataset("mix.zarr", rows=8)
    for batch in DataLoader(data, batch_size=None, num_workers=2): ...

The dataset makes whole batches in the mixture's order. Every worker draws all batches, which
costs microseconds per row, and reads only its own: so each row comes exactly once, the order is
that of one process, and new weights hold from one agreed batch in all workers. The price: workers
cannot take over one another's batches.

Shape letters: B rows, S positions, K kept entries, D domains.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ddk_cache import SPLITS, TRAIN, Cache, InputError, MismatchError, open_cache
from ddk_cache.errors import unknown
from ddk_train.data.decode import Decoded, Dequantizer
from ddk_train.data.mixture import Draw, Floats, Mixture
from ddk_train.data.schedule import Schedule
from ddk_train.weights.factors import floored

IGNORED = -100
"""The label of a position that does not count, as in transformers."""

Weights = str | Mapping[str, float] | Sequence[float] | Floats
"""`uniform`, `proportional` (to rows), or numbers: by domain, or in the order of the domains."""


class CacheDataset(IterableDataset[dict[str, torch.Tensor]]):
    """Batches of a cache for `DataLoader(dataset, batch_size=None, num_workers=…)`.

    A batch has `input_ids` (B, S+1) int64; `labels` (B, S+1) int64, −100 at position 0 and where
    the loss does not count, unshifted as transformers expects; the teacher's `target_ids`
    (B, S, K) int64, `target_probs` (B, S, K) float32 and `target_tail` (B, S) float32 for the
    tokens after positions 0 … S−1; and `domain` and `row` (B) int64, the numbers of each row. Where
    the cache keeps documents apart, `position_ids` (B, S+1) int64 begin anew with each.

    The dataset shares rows among ranks itself: do not pass its DataLoader to `accelerator.prepare`.
    """

    def __init__(
        self,
        cache: Cache | str | Path,
        *,
        rows: int,
        weights: Weights = "uniform",
        split: str = TRAIN,
        seed: int = 0,
        temperature: float = 1.0,
        epochs: int | None = None,
        device: str | torch.device = "cpu",
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        """Open a cache by its path, or use an open one.

        `rows` is the number of rows per batch over all `world` processes, of which `rank` gets
        every `world`-th row; the default is torch.distributed's, or RANK and WORLD_SIZE. Batches
        never end, unless `epochs` limits them to so many times the rows of the split; with
        `proportional` weights each row then comes exactly so many times, and the last batch may
        be smaller. Rows are decoded on `device`, which must be the CPU with workers.

        Raises:
            InputError: a split, a weight, or a number of rows is wrong.
            MismatchError: the cache does not have the targets at this temperature.
            CacheError: see `open_cache`.
        """
        self.cache = cache if isinstance(cache, Cache) else open_cache(cache)
        self.split, self.temperature = split, temperature
        self.rows, self.seed, self.device = rows, seed, torch.device(device)
        self.rank, self.world = process() if rank is None or world is None else (rank, world)
        if split not in SPLITS:
            raise InputError(unknown("split", split, SPLITS))
        if rows < 1 or rows % self.world:
            raise InputError(
                f"rows: got {rows}, expected a positive multiple of the {self.world} processes."
            )
        extents = {name: self.cache.extents(name, split) for name in self.cache.domains}
        self._extents = {name: runs for name, runs in extents.items() if any(e.rows for e in runs)}
        if not self._extents:
            raise InputError(f"{self.cache.where}: no domain has rows in the split {split!r}.")
        self.domains = list(self._extents)
        self._chunk_rows = self.cache.spec.chunk_rows
        self._dequantize = Dequantizer(self.cache, self.domains, self.device, temperature)
        self._start: dict[str, Any] = {"batch": 0, "mixture": {}, "drawn": [0] * len(self.domains)}
        self._walk = self._at_start()
        sizes = self._walk.mixture.sizes
        self._limit = None if epochs is None else epochs * int(sizes.sum())
        self._sizes: Floats = sizes
        self._schedule = Schedule(as_array(weights, self.domains, sizes))
        self._walk = self._at_start()
        self._consumed = self._walk

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this worker's batches, from the position loaded last, or from the beginning."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = worker if info else None
        walk = self._walk = self._at_start()
        self._schedule.begin(reader, walk.batch)
        while self._limit is None or walk.batch * self.rows < self._limit:
            batch = walk.batch
            self._schedule.mark(reader, batch + 1)
            draw = walk.next(self._schedule.at(batch))
            if (batch - self._start.get("origin", 0)) % workers == worker:
                yield self._read(draw, batch)

    def _read(self, draw: Draw, batch: int) -> dict[str, torch.Tensor]:
        left = None if self._limit is None else self._limit - batch * self.rows
        share = slice(self.rank, left, self.world)
        domain_B, row_B = draw.domain[share], draw.row[share]
        decoded = self._dequantize.read(self.split, domain_B, row_B)
        numbers = {"domain": torch.from_numpy(domain_B), "row": torch.from_numpy(row_B)}
        return as_dict(decoded) | numbers

    def _at_start(self) -> Walk:
        mixture = Mixture(
            self._extents, chunk_rows=self._chunk_rows, rows=self.rows, seed=self.seed
        )
        mixture.load_state_dict(self._start["mixture"])
        return Walk(mixture, self._start["batch"], self._start["drawn"])

    # --- weights ---

    @property
    def weights(self) -> dict[str, float]:
        """Return the weights announced last, by domain."""
        last = self._schedule.from_batch(self._walk.batch)[-1][1]
        return dict(zip(self.domains, last.tolist(), strict=True))

    def set_weights(self, weights: Weights, *, at: int | None = None) -> None:
        """Draw rows by new weights from batch number `at`, counted from 0 at the very beginning.

        Without workers the default is the next batch. DataLoader workers read ahead, and all of
        them must change at one batch that none has been asked for: give `at` = batches consumed +
        num_workers · prefetch_factor, the same on every rank.

        Raises:
            InputError: the weights are wrong, `at` is missing, or that batch is already drawn.
        """
        self._schedule.append(as_array(weights, self.domains, self._sizes), at)

    # --- state ---

    def state_dict(self, batch: int | None = None) -> dict[str, Any]:
        """Return the position as plain JSON values, floats exact.

        Without workers it is the position after the last batch. With workers, the main process
        does not see the batches: pass the number consumed as `batch`. (torchdata's
        StatefulDataLoader calls this in each worker, which needs no number.)
        """
        walk = self._walk if batch is None else self._walk_to(batch)
        changes = self._schedule.from_batch(walk.batch)
        return {
            "batch": walk.batch,
            "origin": self._start.get("origin", 0),
            "mixture": walk.mixture.state_dict(),
            "drawn": walk.drawn.tolist(),
            "weights": [[at, [float(w).hex() for w in weights]] for at, weights in changes],
            "order": self._order(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position: the next iteration begins there.

        Raises:
            MismatchError: the position is one of other rows, another seed or other domains.
        """
        if state["order"] != self._order():
            raise MismatchError(
                f"the saved position belongs to {state['order']}; this dataset has "
                f"{self._order()}. Use the same settings to resume."
            )
        worker = get_worker_info() is not None
        # The batches of a worker are counted from where its DataLoader began.
        origin = state["origin"] if worker else state["batch"]
        same = {name: state[name] for name in ("batch", "mixture", "drawn")}
        self._start = {"origin": origin, **same}
        changes = [
            (at, np.array([float.fromhex(w) for w in weights])) for at, weights in state["weights"]
        ]
        if worker:
            self._schedule.load_own(changes)
        else:
            self._schedule.replace(changes, state["batch"])
        self._walk = self._consumed = self._at_start()

    def drawn(self, batch: int) -> dict[str, int]:
        """Return how many rows of each domain are in the batches before number `batch`."""
        return dict(zip(self.domains, self._walk_to(batch).drawn.tolist(), strict=True))

    def _walk_to(self, batch: int) -> Walk:
        if self._consumed.batch > batch:
            self._consumed = self._at_start()
        if self._consumed.batch > batch:
            raise InputError(f"batch {batch} lies before the position loaded last.")
        while self._consumed.batch < batch:
            self._consumed.next(self._schedule.at(self._consumed.batch))
        return self._consumed

    def _order(self) -> dict[str, Any]:
        """Return what the order of rows depends on."""
        return {
            "rows": self.rows,
            "seed": self.seed,
            "split": self.split,
            "domains": self.domains,
            "sizes": self._sizes.astype(int).tolist(),
        }


class Walk:
    """A mixture, and the number of batches and of rows of each domain (D) drawn from it."""

    def __init__(self, mixture: Mixture, batch: int, drawn: Sequence[int]) -> None:
        self.mixture, self.batch, self.drawn = mixture, batch, np.array(drawn, np.int64)

    def next(self, weights: Floats) -> Draw:
        """Draw the next batch."""
        draw = self.mixture.next(weights)
        self.batch += 1
        self.drawn = self.drawn + np.bincount(draw.domain, minlength=len(self.drawn))
        return draw


def as_dict(decoded: Decoded) -> dict[str, torch.Tensor]:
    """Return rows in the names and conventions of transformers."""
    tokens, mask, targets, positions = decoded
    labels = torch.full_like(tokens, IGNORED)
    labels[:, 1:] = tokens[:, 1:].where(mask, IGNORED)
    return {
        "input_ids": tokens,
        "labels": labels,
        "target_ids": targets.ids,
        "target_probs": targets.probs,
        "target_tail": targets.tail,
    } | ({} if positions is None else {"position_ids": positions})


def as_array(weights: Weights, domains: Sequence[str], sizes: Floats) -> Floats:
    """Return (D) weights that sum to one.

    Raises:
        InputError: the name is unknown, or the numbers do not fit the domains.
    """
    D = len(domains)
    named: dict[str, Floats] = {
        "uniform": floored(np.full(D, -np.log(D))),  # the bits of `ddk-train --weighting uniform`
        "proportional": sizes / sizes.sum(),
    }
    if isinstance(weights, str):
        if weights not in named:
            raise InputError(
                f"{unknown('weights', weights, list(named))} For weights that follow the gaps, "
                "pass numbers and move them with set_weights."
            )
        return named[weights]
    if isinstance(weights, Mapping):
        if set(weights) != set(domains):
            raise InputError(
                f"weights: got the domains {', '.join(weights)}, expected {', '.join(domains)}."
            )
        weights = [weights[name] for name in domains]
    numbers: Floats = np.array(weights, np.float64)
    if numbers.shape != (D,) or not np.isfinite(numbers).all() or (numbers < 0).any():
        raise InputError(f"weights: got {weights}, expected {D} numbers, none below 0.")
    if not numbers.any():
        raise InputError("weights: all are 0. Give at least one domain a weight above 0.")
    return numbers if numbers.sum() == 1 else numbers / numbers.sum()


def process() -> tuple[int, int]:
    """Return the rank of this process, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    except ValueError as error:
        raise InputError(f"RANK and WORLD_SIZE must be whole numbers: {error}.") from None
    return rank, world
