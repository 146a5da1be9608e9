"""Every error of the project as one tree: a message for people, and an exit code.

A class exists only where a caller may act on the difference; everything else is in the message.

    DDKError                    exit code 1
    ├── InputError              exit code 2: the call cannot be met
    │   ├── UnknownNameError    also a KeyError: no such domain or split
    │   └── RowRangeError       also an IndexError: no such row
    └── CacheError
        ├── NotACacheError
        ├── FormatVersionError
        ├── UnfinishedCacheError
        ├── CorruptCacheError
        ├── StorageError
        └── MismatchError       exit code 2
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DDKError(Exception):
    """Anything that a person must know: the message says what, where, and what to do next."""

    exit_code = 1


class InputError(DDKError):
    """The request cannot be met as it was given (exit code 2)."""

    exit_code = 2


class UnknownNameError(InputError, KeyError):
    """A cache has no domain, or a domain no split, of this name."""

    __str__ = Exception.__str__  # a KeyError would show the repr of its message


class RowRangeError(InputError, IndexError):
    """A split has no row of this number."""


class CacheError(DDKError):
    """Something is wrong with a cache."""


class NotACacheError(CacheError):
    """The path holds no ddk cache."""


class FormatVersionError(CacheError):
    """The cache was written in a format that this version does not read."""


class UnfinishedCacheError(CacheError):
    """Rows were asked for that no committed shard holds."""


class CorruptCacheError(CacheError):
    """Stored bytes differ from what was committed."""


class StorageError(CacheError):
    """The directory or object store of a cache did not answer, or refused."""


class MismatchError(CacheError):
    """Two things that must agree (a cache and a request, a cache and a student) do not."""

    exit_code = 2


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name: the nearest known one, and the whole list."""
    words = sorted(known)
    near = difflib.get_close_matches(given, words, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {given!r}.{hint} Known: {', '.join(words)}."
