"""One spelling of a value, and one hash of bytes."""

from __future__ import annotations

import pytest

from ddk_cache.hashing import canonical, digest


def test_the_spelling_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical({"b": [1, 2.5], "a": "ü"}) == b'{"a":"\\u00fc","b":[1,2.5]}'
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})


def test_what_json_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))


def test_the_hash_is_the_same_forever() -> None:
    assert digest(b"") == "99aa06d3014798d86001c324468d497f"
    assert len(digest(b"ddk")) == 32
    assert digest(b"ddk") != digest(b"kdd")
