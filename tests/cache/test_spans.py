"""Text with learned spans → tokens: tokens at the border of a span, and control tokens as text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_cache.corpus.spans import Sample, control_tokens, encode_sample, guard
from ddk_cache.testing import END, byte_tokenizer


@pytest.fixture(scope="module")
def merging() -> Any:
    """A tokenizer of bytes that joins a space and a digit to one token."""
    from tokenizers import models

    tokenizer = byte_tokenizer()
    vocab = tokenizer.get_vocab() | {"Ġ2": 257}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocab, merges=[("Ġ", "2")])
    return tokenizer


@pytest.mark.parametrize(
    ("text", "span", "learned"),
    [
        ("A: 2", (2, 4), " 2"),
        ("A: 2", (3, 4), " 2"),  # the token has a part in the span
        ("A: 2", (0, 3), "A: 2"),
        ("A:2", (2, 3), "2"),
        ("é2", (1, 2), "2"),
        ("é2", (0, 1), "é"),  # of two tokens
        ("A: 2", (3, 3), ""),
    ],
)
def test_a_token_with_a_part_in_a_span_is_learned(
    text: str, span: tuple[int, int], learned: str, merging: Any
) -> None:
    ids, flags = encode_sample(merging, Sample(text, [span]), control_tokens(merging))
    assert ids == merging(text)["input_ids"]
    found = [token for token, flag in zip(ids, flags, strict=True) if flag]
    assert merging.decode(found) == learned


def test_control_tokens_are_guarded_in_all_that_json_holds(tokenizer: Any) -> None:
    control = control_tokens(tokenizer)
    assert control == (END,)
    value = {"a": [f"x{END}", {"b": END}], "n": 1, "none": None, END: True}
    mark = guard(END, control)
    assert END not in mark
    assert guard(value, control) == {
        "a": [f"x{mark}", {"b": mark}],
        "n": 1,
        "none": None,
        END: True,
    }
    assert guard(END, ()) == END


@given(st.lists(st.sampled_from([END, "a", "é", "<|end", "oftext|>", "\n"])))
def test_what_is_guarded_is_the_same_text_without_control_tokens(parts: list[str]) -> None:
    tokenizer = byte_tokenizer()
    control, text = control_tokens(tokenizer), "".join(parts)
    guarded = guard(text, control)
    ids, flags = encode_sample(tokenizer, Sample(guarded, [(0, len(guarded))]), control)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert all(flags)


def test_private_characters_of_a_document_are_text(tokenizer: Any) -> None:
    text = "a\ue0007\ue001b\ue000" + "9" * 5000 + "\ue001"
    ids, _ = encode_sample(tokenizer, Sample(guard(text, (END,)), []), (END,))
    assert tokenizer.decode(ids) == text
