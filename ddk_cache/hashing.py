"""Content hashes: one JSON spelling of a value, and xxh3 of bytes.

xxh3 finds damage at the speed of memory; it does not protect from somebody who means harm.
"""

from __future__ import annotations

import json
from typing import Any

import xxhash


def canonical(value: Any) -> bytes:
    """Return the JSON spelling of a value that is hashed: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(data: bytes) -> str:
    """Return the content hash used throughout: xxh3, 128 bits, in hex."""
    return xxhash.xxh3_128_hexdigest(data)
