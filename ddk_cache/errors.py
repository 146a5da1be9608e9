"""Everything that can be wrong, as one tree: a message for people, and an exit code.

Errors are told apart where somebody may act on the difference, and nowhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DDKError(Exception):
    """Anything that a person has to know: the message says what, where, and what to do next."""

    exit_code = 1


class InputError(DDKError):
    """The request cannot be met as it was given (exit code 2)."""

    exit_code = 2


class CacheError(DDKError):
    """A cache on disk is not what it has to be."""


class NotACacheError(CacheError):
    """The path holds no ddk cache."""


class FormatVersionError(CacheError):
    """The cache was written in a format that this version does not read."""


class UnfinishedCacheError(CacheError):
    """Rows were asked for that no committed shard holds."""


class CorruptCacheError(CacheError):
    """Stored bytes differ from what was committed."""


class StorageError(CacheError):
    """The place where a cache lies did not answer, or refused."""


class MismatchError(CacheError):
    """Two things that must agree (a cache and a request, a cache and a student) do not."""

    exit_code = 2


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """Say that `given` is no known `what`, with the nearest known word and the whole list."""
    words = sorted(known)
    near = difflib.get_close_matches(given, words, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {given!r}.{hint} Known: {', '.join(words)}."
