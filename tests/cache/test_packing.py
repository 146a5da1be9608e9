"""Packing: the stream cut every S tokens, and documents whole, apart and close together."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ddk_cache.corpus.packing import DocumentPacker, StreamPacker, fullest

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=120)
PADDING = 10**6


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 5))
def test_packed_rows_are_the_stream_cut_every_s_tokens(
    lengths: list[int], seq_len: int, block: int
) -> None:
    packer = StreamPacker(seq_len)
    stream: list[int] = []
    counted: list[bool] = []
    rows: list[tuple[Any, Any]] = []
    for length in lengths:
        tokens = list(range(len(stream), len(stream) + length))
        flags = [token % 3 > 0 for token in tokens]
        stream += tokens
        counted += flags
        packer.add((tokens, flags))
        while packer.rows >= block:
            rows += zip(*packer.take(block).values(), strict=True)
    rows += zip(*packer.take(packer.rows).values(), strict=True)
    assert len(rows) == max(0, (len(stream) - 1) // seq_len)
    for number, (tokens, mask) in enumerate(rows):
        first = number * seq_len
        assert tokens.tolist() == stream[first : first + seq_len + 1]
        assert mask.tolist() == counted[first + 1 : first + seq_len + 1]


def packed(
    lengths: list[int], seq_len: int, too_long: str = "split", block: int = 3
) -> tuple[dict[str, Any], int]:
    """Return the arrays of documents of consecutive numbers, and the tokens left out.

    Every token counts but the multiples of three.
    """
    packer, numbers, blocks = DocumentPacker(seq_len, too_long, PADDING), itertools.count(), []
    for length in lengths:
        tokens = list(itertools.islice(numbers, length))
        packer.add((tokens, [token % 3 > 0 for token in tokens]))
        while packer.rows >= block:
            blocks.append(packer.take(block))
    packer.finish()
    blocks.append(packer.take(packer.rows))
    return {n: np.concatenate([b[n] for b in blocks]) for n in blocks[0]}, packer.lost


def documents_in(arrays: dict[str, Any]) -> list[list[int]]:
    """Return the documents and pieces in rows, in order of their first tokens."""
    found = []
    for tokens, segments in zip(arrays["tokens"], arrays["segments"], strict=True):
        assert segments.max() >= 1
        numbers = [number for number, _ in itertools.groupby(segments.tolist())]
        expected = list(range(1, int(segments.max()) + 1))
        assert numbers in (expected, [*expected, 0])
        found += [tokens[segments == number].tolist() for number in expected]
    return sorted(found)


@given(LENGTHS, st.integers(1, 40))
def test_a_document_that_fits_is_whole_and_no_label_crosses_a_boundary(
    lengths: list[int], seq_len: int
) -> None:
    arrays, lost = packed(lengths, seq_len)
    stream, found = itertools.count(), documents_in(arrays)
    assert lost == 0
    for length in lengths:
        document = list(itertools.islice(stream, length))
        pieces = [found.pop(0)]
        while pieces[-1][-1] < document[-1]:
            pieces.append(found.pop(0))
        assert len(pieces) == max(1, -(-(length - 1) // seq_len))
        assert pieces[0] + [token for piece in pieces[1:] for token in piece[1:]] == document
        assert all(one[-1] == other[0] for one, other in itertools.pairwise(pieces))
    assert not found
    tokens, segments, mask = arrays["tokens"], arrays["segments"], arrays["loss_mask"]
    assert (tokens[segments == 0] == PADDING).all()
    labels, inside = tokens[:, 1:], segments[:, 1:] == segments[:, :-1]
    np.testing.assert_array_equal(mask, inside & (segments[:, 1:] > 0) & (labels % 3 > 0))
    first = set(np.cumsum([0, *lengths[:-1]]).tolist())  # of a document: never a label
    counted = [token for token in range(sum(lengths)) if token % 3 and token not in first]
    assert sorted(labels[mask].tolist()) == counted


@given(LENGTHS, st.integers(1, 40))
def test_documents_longer_than_a_row_are_left_out_or_cut_off(
    lengths: list[int], seq_len: int
) -> None:
    size = seq_len + 1
    dropped, lost = packed(lengths, seq_len, "drop")
    assert (dropped["segments"] > 0).sum() == sum(n for n in lengths if n <= size)
    assert lost == sum(n for n in lengths if n > size)
    cut, lost = packed(lengths, seq_len, "truncate")
    assert (cut["segments"] > 0).sum() == sum(min(n, size) for n in lengths)
    assert lost == sum(max(0, n - size) for n in lengths)
    assert len(documents_in(cut)) == len(lengths)


@given(LENGTHS, st.integers(1, 40), st.integers(1, 7))
def test_rows_do_not_depend_on_how_they_are_taken(
    lengths: list[int], seq_len: int, block: int
) -> None:
    one, other = packed(lengths, seq_len, block=block)[0], packed(lengths, seq_len, block=10**6)[0]
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


@given(st.lists(st.integers(1, 20), max_size=9), st.integers(0, 40))
def test_the_fullest_choice_is_the_best_of_all_choices(lengths: list[int], room: int) -> None:
    chosen = fullest(lengths, room)
    assert chosen == sorted(set(chosen))
    sums = [
        sum(some) for n in range(len(lengths) + 1) for some in itertools.combinations(lengths, n)
    ]
    assert sum(lengths[place] for place in chosen) == max(s for s in sums if s <= room)


def test_of_equal_choices_the_longest_and_oldest_is_taken() -> None:
    assert fullest([2, 3, 5, 5, 1], 5) == [2]
    assert fullest([1, 1, 1], 2) == [0, 1]
    assert fullest([7, 8], 5) == []


def test_rows_are_full_where_documents_are_short() -> None:
    draw = np.random.default_rng(0)
    for low, high in ((3, 20), (20, 200), (100, 250)):
        lengths = draw.integers(low, high, 200 * 513 // high).tolist()
        arrays, _ = packed(lengths, 512)
        assert (arrays["segments"] == 0).mean() < 0.03


def test_no_document_waits_for_ever() -> None:
    packer = DocumentPacker(9, "split", 0)
    packer.add(([5] * 7, [True] * 7))
    for _ in range(100):  # pairs that fill a row without it
        packer.add(([1] * 5, [True] * 5))
    assert packer.rows
    assert packer.take(1)["tokens"][0, 0] == 5
