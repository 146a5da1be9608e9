"""Content hashes: one JSON spelling of a value, and xxh3 of bytes."""

from __future__ import annotations

import json
from typing import Any

import xxhash


def canonical(value: Any) -> bytes:
    """Return the one JSON spelling of a value that hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(data: bytes) -> str:
    """Return the content hash used throughout: xxh3, 128 bits, in hex."""
    return xxhash.xxh3_128_hexdigest(data)
