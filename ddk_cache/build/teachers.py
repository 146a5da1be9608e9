"""The teachers of a build, of which one at a time is in memory.

Most caches have one teacher. Where domains of a mix file name teachers of their own, all of them
are loaded once before anything is written, so that one that does not fit the cache is found first;
then each scores its domains. The price is that a process loads a teacher twice.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ddk_cache.build.config import BuildConfig
from ddk_cache.build.create import make_spec, try_teacher
from ddk_cache.build.teacher import Teacher
from ddk_cache.corpus.sources import OWN, Source
from ddk_cache.errors import InputError, MismatchError
from ddk_cache.format.spec import CacheSpec
from ddk_cache.hf import identify_tokenizer

Load = Callable[[str], tuple[Teacher, Any]]
"""Name → a teacher and its tokenizer. `OWN` is the cache's own teacher."""


class Teachers:
    """Teachers by name; getting another one frees the memory of the one before."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._name: str | None = None
        self._held: tuple[Teacher, Any] | None = None

    @classmethod
    def of(cls, teacher: Teacher, tokenizer: Any) -> Teachers:
        """Return the teachers of a build that was given one teacher."""

        def load(name: str) -> tuple[Teacher, Any]:
            if name != OWN:
                raise InputError(
                    f"a domain names the teacher {name!r}, and build_cache was given one Teacher. "
                    "Give it Teachers, with a function that loads them by name."
                )
            return teacher, tokenizer

        return cls(load)

    def get(self, name: str = OWN) -> tuple[Teacher, Any]:
        """Return a teacher and its tokenizer. Raises what loading it raises."""
        if self._held is None or name != self._name:
            self._held = None
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            self._name, self._held = name, self._load(name)
        return self._held


class Other(NamedTuple):
    """What is known of a teacher that is not the cache's own."""

    spec: CacheSpec
    """The spec of a cache of this teacher alone."""
    batch_rows: int
    """Rows of one call, as asked or as they fit."""


def meet(
    teachers: Teachers, sources: Sequence[Source], tokenizer: Any, config: BuildConfig
) -> tuple[CacheSpec, dict[str, Other]]:
    """Return the spec of a cache, and what is known of each other teacher, by name.

    The cache's own teacher is loaded last and remains in memory.

    Raises:
        InputError: a teacher cannot be loaded, or cannot score such rows.
        MismatchError: its tokenizer or the number of its outputs is not the cache's.
        CacheError: it fails on a first batch.
    """
    others = {}
    for name in sorted({source.teacher for source in sources} - {OWN}):
        teacher, words = teachers.get(name)
        mine, its = (identify_tokenizer(each)["vocabulary"] for each in (tokenizer, words))
        if mine != its:
            raise MismatchError(
                f"teacher {name!r}: got a tokenizer with the vocabulary {its}, expected {mine}, "
                "the cache's. All teachers of a cache share one vocabulary."
            )
        spec = make_spec(config, teacher, tokenizer)
        others[name] = Other(spec, try_teacher(teacher, spec, config.batch_rows))
        del teacher
    own = make_spec(config, teachers.get()[0], tokenizer)
    for name, other in others.items():
        if other.spec.vocab_size != own.vocab_size:
            raise MismatchError(
                f"teacher {name!r}: got {other.spec.vocab_size:,} outputs, expected "
                f"{own.vocab_size:,} as the cache's own teacher has. Build a cache of its own."
            )
    return own, others


def describe(sources: Sequence[Source], others: Mapping[str, Other]) -> dict[str, dict[str, Any]]:
    """Return what a cache keeps of its sources: their settings, and the teachers they name."""
    return {
        source.name: source.describe()
        | ({"teacher": dict(others[source.teacher].spec.teacher)} if source.teacher else {})
        for source in sources
    }
