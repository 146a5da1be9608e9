"""What `ddk-cache build` was asked for, as plain values that any process can carry out.

Paths become absolute when an order is made, because a worker runs in another directory. On another
machine they must lead to the same files, so corpus, cache and teacher are on a shared file system,
in an object store or on the hub.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from ddk_cache.build.config import BuildConfig
from ddk_cache.corpus.sources import OWN, find_sources
from ddk_cache.errors import InputError
from ddk_cache.models.config import TeacherConfig
from ddk_cache.storage.open import is_url, open_storage

if TYPE_CHECKING:
    from ddk_cache.build.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Order:
    """A cache to be built, by one process or by many."""

    corpus: Path
    cache: str
    teacher: str
    """Directory, hub id or address of a server."""
    tokenizer: str | None
    """By default the teacher's."""
    config: BuildConfig
    how: TeacherConfig
    """How each teacher is loaded and run."""
    model: str | None = None
    """Name of the teacher on its server."""
    head: str | None = None
    """Head of the teacher on its server."""
    grow: bool = False

    def absolute(self) -> Order:
        """Return the order with absolute paths."""
        cache = self.cache if is_url(self.cache) else str(Path(self.cache).absolute())
        how = self.how
        how = dataclasses.replace(
            how,
            offload_folder=how.offload_folder and str(Path(how.offload_folder).absolute()),
            model_kwargs=_absolute(how.model_kwargs) if isinstance(how.model_kwargs, str) else None,
        )
        return dataclasses.replace(
            self,
            corpus=self.corpus.absolute(),
            cache=cache,
            teacher=_absolute(self.teacher),
            tokenizer=_absolute(self.tokenizer),
            how=how,
            head=_absolute(self.head),
        )

    def load(self, name: str) -> tuple[Teacher, Any]:
        """Return a teacher and its tokenizer: the one ordered, or that of a domain of the mix."""
        from ddk_cache.served.teacher import find_teacher

        targets = self.config.targets
        if name == OWN:
            own = self.teacher, self.tokenizer, targets, self.how
            return find_teacher(*own, model=self.model, head=self.head)
        words = self.tokenizer or self.teacher if is_url(name) else None
        return find_teacher(name, words, targets, dataclasses.replace(self.how, revision=None))

    def build(self, rank: int = 0, world: int = 1, stop: Event | None = None) -> bool:
        """Load the teacher and build the cache; see `build_cache` for the arguments.

        Of the processes that run one teacher together, the first builds and gets true.

        Raises:
            DDKError: see `find_sources`, `find_teacher` and `build_cache`.
        """
        sources = find_sources(self.corpus)

        from ddk_cache.build.job import build_cache
        from ddk_cache.build.teachers import Teachers
        from ddk_cache.format.place import check_place

        check_place(open_storage(self.cache))
        teachers = Teachers(self.load)
        build = partial(
            build_cache,
            self.cache,
            sources,
            teachers,
            teachers.get()[1],
            self.config,
            grow=self.grow,
            rank=rank,
            world=world,
            stop=stop,
        )
        if self.how.tensor_parallel == 1:
            build()
            return True
        if others := {source.teacher for source in sources} - {OWN}:
            raise InputError(
                f"--tensor-parallel: domains name the teachers {', '.join(sorted(others))}, and "
                "processes run one teacher together. Build a cache for each teacher."
            )
        with teachers.get()[0].in_step() as first:
            if first:
                build()
        return first


def _absolute(name: Any) -> Any:
    """Return the absolute path of what is a path here; anything else as it is."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name
