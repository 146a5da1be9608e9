"""Documents apart in a row: their positions, and models that do not keep them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddk_cache import InputError, Teacher
from ddk_cache.isolation import check_isolation, positions_of
from ddk_cache.testing import VOCAB, random_teacher

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_positions_begin_anew_with_each_document_and_with_padding(dtype: torch.dtype) -> None:
    segments = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]).to(dtype)
    assert positions_of(segments).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], list(range(8))]


def one_hot(tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(tokens, VOCAB).float()


def leaks(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return logits that depend on all tokens before them, of any document."""
    return one_hot(tokens).cumsum(1)


def ignores(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return logits of documents apart, that depend on places in the row."""
    place = torch.arange(tokens.shape[1])[None, :, None]
    return one_hot(tokens) * (1 + place)


def obeys(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return one_hot(tokens) * (1 + positions[..., None])


@pytest.mark.parametrize(
    ("logits", "said"),
    [(leaks, "change by 1 with the document before it"), (ignores, "in a row and alone differ by")],
)
def test_a_function_that_does_not_keep_them_apart_is_refused(logits: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        check_isolation("this model", logits, VOCAB, CPU, None)
    assert "this model does not keep" in str(error.value)
    assert "--packing stream" in str(error.value)


def test_a_function_that_does_is_accepted_whatever_its_longest_row() -> None:
    for longest in (None, 2, 5, 1000):
        check_isolation("this model", obeys, VOCAB, CPU, longest)


def test_a_teacher_of_tokens_alone_is_refused() -> None:
    random_teacher().require_isolation()
    teacher = Teacher(lambda tokens: one_hot(tokens), VOCAB, {}, name="mine")
    with pytest.raises(InputError, match="teacher 'mine' is a function of tokens alone"):
        teacher.require_isolation()
    claims = Teacher(lambda tokens: one_hot(tokens), VOCAB, {}, takes_positions=True)
    with pytest.raises(InputError, match="takes no position ids"):
        claims.require_isolation()
