"""What a server answers, read: entries by rank, and errors as people should see them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddk_cache import InputError
from ddk_cache.served.server import message, parse


def choice(*positions: dict[str, float]) -> dict[str, Any]:
    entries = [{name: {"logprob": x} for name, x in at.items()} for at in positions]
    return {"prompt_logprobs": [None, *entries]}


def test_entries_are_sorted_and_the_label_is_kept_apart() -> None:
    told = choice({"7": -0.5, "3": -2.0, "9": -1.0}, {"4": -0.1, "3": -3.0})
    found = parse("here", told, [3, 4], 2)
    assert found.ids.tolist() == [[7, 9], [4, 3]]
    np.testing.assert_array_equal(found.logprobs, [[-0.5, -1.0], [-0.1, -3.0]])
    np.testing.assert_array_equal(found.label, [-2.0, -0.1])
    assert found.greedy is None
    told["logprobs"] = {"tokens": ["token_id:12"], "token_logprobs": [-0.25]}
    assert parse("here", told, [3, 4], 2).greedy == (12, -0.25)


def test_missing_entries_are_refused() -> None:
    with pytest.raises(InputError, match="got 1 log-probabilities at a position, expected 2"):
        parse("here", choice({"3": -1.0}), [3], 2)
    with pytest.raises(InputError, match="and that of the true next token"):
        parse("here", choice({"3": -1.0, "4": -2.0}), [5], 2)
    with pytest.raises(InputError, match="got 1 positions, expected 2"):
        parse("here", choice({"3": -1.0}), [3, 4], 1)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "no such model"}}', "no such model"),
        (b'{"error": "no such model"}', "no such model"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"message": "no"}', "no"),
        (b"<html>", "<html>"),
        (b"[1]", "[1]"),
    ],
)
def test_the_message_of_an_error_is_found(body: bytes, text: str) -> None:
    assert message(body) == text
