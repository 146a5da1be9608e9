"""What `ddk-cache build` was asked for, as plain values that any process can carry out.

Paths become absolute when an order is made, because a worker runs in another directory. On another
machine they must lead to the same files, so corpus, cache and teacher are on a shared file system,
in an object store or on the hub.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from ddk_cache.build.config import BuildConfig
from ddk_cache.corpus.sources import OWN, find_sources
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
    how: Mapping[str, Any]
    """How the teacher is run: what `find_teacher` takes by name."""
    grow: bool

    def absolute(self) -> Order:
        """Return the order with absolute paths."""
        cache = self.cache if is_url(self.cache) else str(Path(self.cache).absolute())
        head = _absolute(self.how.get("head"))
        return dataclasses.replace(
            self,
            corpus=self.corpus.absolute(),
            cache=cache,
            teacher=_absolute(self.teacher),
            tokenizer=_absolute(self.tokenizer),
            how={**self.how, "head": head},
        )

    def load(self, name: str) -> tuple[Teacher, Any]:
        """Return a teacher and its tokenizer: the one ordered, or that of a domain of the mix."""
        from ddk_cache.served.teacher import find_teacher

        if name == OWN:
            return find_teacher(self.teacher, self.tokenizer, self.config.targets, **self.how)
        words = self.tokenizer or self.teacher if is_url(name) else None
        how = {**self.how, "model": None, "head": None}
        return find_teacher(name, words, self.config.targets, **how)

    def build(self, rank: int = 0, world: int = 1, stop: Event | None = None) -> None:
        """Load the teacher and build the cache; see `build_cache` for the arguments.

        Raises:
            DDKError: see `find_sources`, `find_teacher` and `build_cache`.
        """
        sources = find_sources(self.corpus)
        from ddk_cache.build.create import check_place
        from ddk_cache.build.job import build_cache
        from ddk_cache.build.teachers import Teachers

        check_place(open_storage(self.cache))
        teachers = Teachers(self.load)
        build_cache(
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


def _absolute(name: Any) -> Any:
    """Return the absolute path of what is a path here; anything else as it is."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name
