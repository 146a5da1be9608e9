"""Sealed JSON documents: written with a hash of their content, read only if it matches.

Threat model: the seal finds damage, not forgery, because whoever can write a cache can seal what
they write. A forged cache can hold wrong numbers; it must not crash a reader, exhaust its memory,
or reach files outside of the cache. So every number is also checked for type and bounds, and every
name for where it leads, before it is used. The price is validation by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ddk_cache.errors import CacheError, CorruptCacheError, DDKError, FormatVersionError
from ddk_cache.format.spec import FORMAT_VERSION
from ddk_cache.hashing import canonical, digest
from ddk_cache.storage.base import Storage

T = TypeVar("T")


def dump(body: Mapping[str, Any]) -> bytes:
    """Return the bytes of a sealed document."""
    sealed = {"format_version": FORMAT_VERSION, **body}
    sealed["seal"] = digest(canonical(sealed))
    return json.dumps(sealed, indent=1, allow_nan=False).encode()


def parse(data: bytes, where: str) -> dict[str, Any]:
    """Return the body of a sealed document.

    Raises:
        FormatVersionError: it is of another format version.
        CorruptCacheError: it is not what was written.
    """
    try:
        body = json.loads(data)
        version = body.pop("format_version")
        body.pop("seal", None)
        if version == FORMAT_VERSION and dump(body) == data:
            return dict(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCacheError(f"{where} is damaged: {error!r}.") from error
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{where} has format version {version}; this ddk reads version {FORMAT_VERSION}. Use "
            "the ddk that built the cache, or build it again."
        )
    raise CorruptCacheError(f"{where} is damaged: its content does not match its seal.")


def read(storage: Storage, name: str) -> bytes:
    """Return the bytes of a document. Raises CorruptCacheError where it is missing."""
    data = storage.get(name)
    if data is None:
        raise CorruptCacheError(f"{storage.uri(name)} cannot be read: it is missing.")
    return data


def typed(value: Any, kind: type[T], least: float = 0, most: float = 2**62) -> T:
    """Return a value of exactly a type and, if a number, within bounds; else ValueError."""
    number = kind in (int, float)
    if type(value) is not kind or (number and not least <= value <= most):  # type: ignore[operator]
        raise ValueError(f"{value!r} where a {kind.__name__} belongs")
    return value


def file_name(name: Any) -> str:
    """Return a name that is one plain file in a folder. Raises ValueError on any other."""
    if not typed(name, str) or Path(name).name != name or name.startswith("."):
        raise ValueError(f"{name!r} is not the name of a file")
    return str(name)


def understand(where: str, build: Any) -> Any:
    """Return `build()`; whatever it fails on becomes a CorruptCacheError about that file."""
    try:
        return build()
    except CacheError:
        raise
    except (DDKError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptCacheError(f"{where} is damaged: {error!r}.") from error
