"""A build on a Ray cluster: workers are started, placed, replaced when they are lost, and watched.

Each worker runs the project's own build on the one cache. Leases and commit records share the work
and make it harmless when two workers do the same, so Ray keeps no list of what is done, and nothing
but the order passes through it. The price is that all machines must reach corpus, cache and teacher
by the same names. Ray starts an actor that died again, a few times; one that is gone for good is
replaced here, as long as shards are committed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from threading import current_thread, main_thread
from typing import Any

from ddk_cache.cluster.order import Order
from ddk_cache.cluster.worker import Worker
from ddk_cache.console import Progress
from ddk_cache.corpus.sources import find_sources
from ddk_cache.errors import CacheError, DDKError, InputError
from ddk_cache.read.cache import open_cache

POLL = 5.0
"""Seconds between two looks at the workers and at what is committed."""

RESTARTS = 3
"""Times that Ray starts an actor again where it died."""

LOSSES = 3
"""Times per worker that workers may be lost for good, or fail, before the next commit; then the
build gives up."""

LOOKING = 0.1
"""Share of the time that looks may take: listing a large cache in an object store takes seconds."""

GRACE = 30.0
"""Seconds in which a worker must confirm that it will stop."""

CONNECT = 5.0
"""Seconds in which a cluster must answer."""

OBJECT_STORE = 80 * 2**20
"""Bytes of Ray's object store, its least: nothing of a build passes through it."""

log = logging.getLogger(__name__)


def build_with_ray(order: Order, address: str, workers: int | None, gpus: float | None) -> None:
    """Build a cache with the workers of a Ray cluster.

    Args:
        order: The build.
        address: "local" for a cluster of this machine alone, which ends with the build; "auto" for
            the one that this machine is part of; or the address of one.
        workers: How many to ask for; by default as many as there is room for. The build does not
            wait for all of them.
        gpus: GPUs of one worker; by default 1 where the cluster has any.

    Raises:
        InputError: Ray is not installed, there is no such cluster, or it lacks the GPUs.
        DDKError: the build failed, or was stopped; see `build_cache`.
    """
    find_sources(order.corpus)  # what a person mistyped is found before workers start
    with cluster(address) as context:
        options, workers = room(nodes(), workers, gpus)
        log.info("%s", describe(context, workers, options))
        Crew(order.absolute(), workers, options).run()


@contextlib.contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Connect to a cluster, or start one of this machine; yield what Ray tells of it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs the package ray: pip install 'ddk-distill[ray]'.") from error
    own = {"object_store_memory": OBJECT_STORE} if address == "local" else {}
    host, _, port = address.rpartition(":")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), CONNECT).close()
        context = ray.init(address=address, logging_level=logging.WARNING, **own)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"--ray: got {address!r}, expected the address of a running Ray cluster ({reason}). "
            "Start one with 'ray start --head', or give --ray local."
        ) from error
    try:
        if current_thread() is main_thread():  # Ray's own handler would end the driver at once
            signal.signal(signal.SIGTERM, handler)
        yield context
    finally:
        ray.shutdown()


def nodes() -> list[dict[str, float]]:
    """Return the resources of each machine of the cluster."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def room(
    machines: Sequence[Mapping[str, float]], workers: int | None, gpus: float | None
) -> tuple[dict[str, float], int]:
    """Return the resources of one worker and how many workers to ask for.

    Without GPUs there is one worker per machine, with all of its cores, or as many as given.
    Raises InputError where a number of workers is not given and there is room for none.
    """
    there = sum(machine.get("GPU", 0.0) for machine in machines)
    gpus = float(there > 0) if gpus is None else gpus
    if gpus:
        workers = workers or sum(int(machine.get("GPU", 0.0) / gpus) for machine in machines)
        if not workers:
            raise InputError(
                f"--gpus-per-worker: got {gpus:g}, and no machine of the cluster has so many GPUs. "
                "Give --workers too if the cluster will grow."
            )
        return {"num_cpus": 1.0, "num_gpus": gpus}, workers
    cores = [machine["CPU"] for machine in machines if machine.get("CPU")]
    workers = workers or max(1, len(cores))
    return {"num_cpus": max(1.0, min([*cores, sum(cores) // workers]))}, workers


def describe(context: Any, workers: int, options: dict[str, float]) -> str:
    """Return a line on the cluster, its workers and its dashboard."""
    each = " and ".join(f"{amount:g} {name[4:-1].upper()}" for name, amount in options.items())
    page = f"http://{context.dashboard_url}" if context.dashboard_url else "none"
    where = context.address_info["gcs_address"]
    return f"Ray at {where}: {workers} workers of {each}; dashboard: {page}"


# --- the driver -----------------------------------------------------------------------------------


class Crew:
    """The workers of a build, and what is known of their work."""

    def __init__(self, order: Order, workers: int, options: dict[str, float]) -> None:
        import ray

        self.ray, self.order, self.world = ray, order, workers
        self.actor = ray.remote(
            max_restarts=RESTARTS,
            max_task_retries=-1,
            max_concurrency=2,  # `stop` is called while `build` runs
            scheduling_strategy="SPREAD",
            **options,
        )(Worker)
        self.builds: dict[Any, tuple[Any, int]] = {}
        """The result to come of each worker → the worker and its rank."""
        self.lost = 0
        """Workers lost since the last commit."""
        self.proven = False
        """Whether a shard was committed, so that the order itself is not what is wrong."""
        self.watch = Watch(order.cache)

    def run(self) -> None:
        """Work until the cache is finished. Raises DDKError where it cannot be, or on Ctrl-C."""
        from ddk_cache.build.job import stopped
        from ddk_cache.storage.open import open_storage

        try:
            with self.watch.progress:
                for rank in range(self.world):
                    self.hire(rank)
                finished = False
                while not finished:
                    done, _ = self.ray.wait(list(self.builds), timeout=POLL)
                    if self.watch.look(f"{self.world} workers"):
                        self.lost, self.proven = 0, True
                    finished = any(self.settle(build) for build in done)
                # The others find nothing left; those that wait for room are not needed.
                self.ray.wait(list(self.builds), num_returns=len(self.builds), timeout=GRACE)
        except KeyboardInterrupt:
            self.drain()
            raise DDKError(stopped(open_storage(self.order.cache))) from None
        except DDKError:
            self.drain()
            raise

    def hire(self, rank: int) -> None:
        """Ask for a worker; it begins as soon as there is room for it."""
        worker = self.actor.remote(self.order, rank, self.world)
        self.builds[worker.build.remote()] = worker, rank

    def settle(self, build: Any) -> bool:
        """Return whether a worker found the cache finished; replace a worker that is lost."""
        _, rank = self.builds.pop(build)
        try:
            failure = self.ray.get(build)
        except self.ray.exceptions.RayActorError as error:
            failure = CacheError(f"it is gone: {_first_line(error)}")
        except self.ray.exceptions.RayTaskError as error:  # nothing that the build foresees
            raise CacheError(f"worker {rank} failed: {error.cause}") from error
        if failure is None:
            return True
        self.lost += 1
        wrong = failure.exit_code == InputError.exit_code and not self.proven
        if wrong or self.lost > LOSSES * self.world:
            raise failure
        log.warning("worker %d is replaced: %s", rank, failure)
        self.hire(rank)
        return False

    def drain(self) -> None:
        """Let the workers finish what they have in hand; end those that do not answer."""
        log.info("stopping: the workers finish their shards; Ctrl-C again ends them at once")
        deadline, heard = time.monotonic() + GRACE, set()
        while self.builds:
            asked = {worker.stop.remote(): build for build, (worker, _) in self.builds.items()}
            done, _ = self.ray.wait(list(self.builds), num_returns=len(self.builds), timeout=POLL)
            answers, _ = self.ray.wait(list(asked), num_returns=len(asked), timeout=0)
            heard |= {asked[answer] for answer in answers}
            late = set(self.builds) - heard if time.monotonic() > deadline else set()
            for build in late:
                self.ray.kill(self.builds[build][0])
            for build in {*done, *late}:
                del self.builds[build]


class Watch:
    """What is committed of a cache, as its records show it."""

    def __init__(self, cache: str) -> None:
        self.cache = cache
        self.progress = Progress("building", 0, "tokens", (self._state() or [0])[0])
        self._next = 0.0

    def look(self, note: str) -> bool:
        """Show how far the cache is; return whether more of it is committed than before."""
        if (began := time.monotonic()) < self._next:
            return False
        state = self._state()
        self._next = began + (time.monotonic() - began) / LOOKING
        if not state:
            return False
        done, total, unplanned = state
        self.progress.total = 0 if unplanned else total
        more = done - self.progress.done
        self.progress.advance(more, f"{unplanned} domains to plan, {note}" if unplanned else note)
        return more > 0

    def _state(self) -> tuple[int, int, int] | None:
        """Return committed and planned tokens and the number of domains that have no plan."""
        try:
            with open_cache(self.cache, unfinished=True) as cache:
                done, total = (rows * cache.spec.seq_len for rows in cache.progress())
                return done, total, len(cache.manifest.root.sources) - len(cache)
        except CacheError:  # it is not begun, or a domain is being planned again
            return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
