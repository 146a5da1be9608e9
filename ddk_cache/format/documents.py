"""Sealed JSON documents: written with a hash of their content, read back only if it matches.

The seal finds damage, not forgery: whoever can write a cache can seal what they write. So every
number of a document is also checked for type and bounds before it is used.
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
    """Return the bytes of a document; a missing one is a CorruptCacheError, for it was named."""
    data = storage.get(name)
    if data is None:
        raise CorruptCacheError(f"{storage.uri(name)} cannot be read: it is missing.")
    return data


def typed(value: Any, kind: type[T], least: float = 0, most: float = 2**62) -> T:
    """Return a value that is exactly of a type and, a number, in its bounds; ValueError else."""
    number = kind in (int, float)
    if type(value) is not kind or (number and not least <= value <= most):  # type: ignore[operator]
        raise ValueError(f"{value!r} where a {kind.__name__} belongs")
    return value


def file_name(name: Any) -> str:
    """Return the name of a file in a folder, if it is one and leads nowhere else."""
    if Path(typed(name, str)).name != name or name.startswith("."):
        raise ValueError(f"{name!r} is no name of a file")
    return str(name)


def understand(where: str, build: Any) -> Any:
    """Return `build()`; what it cannot make sense of is a CorruptCacheError of that file."""
    try:
        return build()
    except CacheError:
        raise
    except (DDKError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptCacheError(f"{where} is damaged: {error!r}.") from error
