"""Long documents of small domains: a share of each is held out, wherever whole ones do not do."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_cache import Cache, open_cache
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.job import build_cache
from ddk_cache.cli import main
from ddk_cache.corpus.passages import LONG, Divider, Document, Piece, held_out, parts, runs
from ddk_cache.inspect.verify import verify
from ddk_cache.testing import BUILD, random_teacher
from ddk_cache.types import TRAIN, VALIDATION
from tests.helpers import call, jsonl, quiet, tree

S = 16


def document(key: int, tokens: int, split: str = TRAIN, text: bool = True) -> Document:
    """Return a document whose tokens are 0, 1, 2, …."""
    return Document(key, split, text, (list(range(tokens)), [True] * tokens))


def divided(*documents: Document, holdout: float = 0.1, passages: bool | None = None) -> Any:
    """Return whether long texts are cut, and the pieces."""
    divider = Divider(S, holdout, passages)
    return list(divider.pieces(documents)), divider.passages


@given(st.integers(0, 2**64 - 1), st.integers(LONG, 300), st.floats(0.01, 0.9))
def test_a_share_of_the_passages_is_held_out_evenly_spread(
    key: int, passages: int, holdout: float
) -> None:
    found = held_out(key, passages, holdout)
    assert found == sorted(set(found))
    assert len(found) < passages
    assert min(abs(len(found) - passages * holdout), passages - len(found)) <= 1
    assert all(0 <= number < passages for number in found)
    widest = 2 * passages / max(1, len(found)) + 2
    assert all(b - a <= widest for a, b in itertools.pairwise(found))


def test_the_number_held_out_is_right_on_average() -> None:
    counts = [len(held_out(key, 13, 0.05)) for key in range(4000)]
    assert set(counts) == {0, 1}
    assert np.mean(counts) == pytest.approx(0.65, abs=0.03)


@given(st.integers(0, 2**64 - 1), st.integers(LONG * S, 3000), st.floats(0.01, 0.9))
def test_parts_keep_order_and_a_gap_at_every_border(key: int, tokens: int, holdout: float) -> None:
    found = list(parts(key, tokens, S, holdout))
    assert found == list(parts(key, tokens, S, holdout))
    kept = sum(stop - start for _, start, stop in found)
    dropped = (len(found) + 1) * 2 * (S // 4)
    assert tokens - dropped <= kept <= tokens
    assert all(start < stop for _, start, stop in found)
    for (one, _, stop), (other, start, _) in itertools.pairwise(found):
        assert one != other or one == VALIDATION
        assert start - stop >= S // 4
    held = [(start, stop) for split, start, stop in found if split == VALIDATION]
    assert all(start % S == 0 and (stop % S == 0 or stop == tokens) for start, stop in held)


def test_runs_by_hand() -> None:
    assert list(runs([])) == []
    assert list(runs([2, 3, 4, 7, 9, 10])) == [(2, 5), (7, 8), (9, 11)]


def test_a_book_is_cut_and_its_parts_begin_without_context() -> None:
    pieces, cut = divided(document(7, 55 * S + 3))
    assert cut
    sizes = {split: sum(len(p[1][0]) for p in pieces if p[0] == split) for split in (TRAIN, "x")}
    held = sum(len(p[1][0]) for p in pieces if p[0] == VALIDATION)
    assert held / (held + sizes[TRAIN]) == pytest.approx(0.1, abs=0.02)
    for number, (_, (tokens, counted)) in enumerate(pieces):
        assert counted == [number == 0] + [True] * (len(tokens) - 1)
        assert tokens == list(range(tokens[0], tokens[-1] + 1))


def test_whole_documents_stay_whole_where_they_meet_the_share_within_a_factor_of_two() -> None:
    many = [document(n, 10 * S, VALIDATION if n % 10 == 0 else TRAIN) for n in range(40)]
    whole: list[Piece] = [(d.split, d.encoded) for d in many]
    assert divided(*many) == (whole, False)
    assert divided(*many, holdout=0.05)[1] is False
    assert divided(*many, holdout=0.21)[1] is True
    assert divided(*many, holdout=0.04)[1] is True
    assert divided(*many, holdout=0.0)[1] is False
    assert divided(*many, holdout=0.0, passages=True)[0] == whole


def test_only_long_texts_are_cut() -> None:
    short = [document(n, LONG * S - 1) for n in range(5)]
    assert divided(*short)[1] is False
    talks = [document(n, 50 * S, text=False) for n in range(5)]
    assert divided(*talks)[1] is False
    pieces, cut = divided(*short, *talks, document(9, 50 * S))
    assert cut
    assert [p[1] for p in pieces[:10]] == [d.encoded for d in (*short, *talks)]
    assert len(pieces) > 11


def test_the_first_documents_decide_for_all() -> None:
    def stream(count: int) -> list[Document]:
        small = [document(n, 5, VALIDATION if n % 10 == 0 else TRAIN) for n in range(count)]
        return [*small, document(77, 5000)]

    assert divided(*stream(200))[1] is False
    assert divided(*stream(199))[1] is True


# --- a build --------------------------------------------------------------------------------------


def text(seed: int, length: int) -> str:
    generator = np.random.default_rng(seed)
    return "".join(generator.choice(list("abcde "), length))


def write(path: Path, *texts: str) -> None:
    path.write_text(jsonl({"text": one} for one in texts))


def make(folder: Path, tokenizer: Any, path: Path, **options: Any) -> Cache:
    config = BuildConfig(**BUILD | {"holdout": 0.1})
    build_cache(path, folder, random_teacher(), tokenizer, config, **options)
    return open_cache(path)


def test_a_domain_of_one_long_document_has_held_out_rows_and_grows(
    tokenizer: Any, tmp_path: Path
) -> None:
    folder, path = tmp_path / "corpus", tmp_path / "mix.zarr"
    folder.mkdir()
    book, other, limited = (text(seed, 1000) for seed in range(3))
    write(folder / "book.jsonl", book)
    cache = make(folder, tokenizer, path)
    plan = cache.plan("book")
    assert plan.passages
    assert plan.rows("validation") == pytest.approx(0.1 * 1000 / S, abs=1.3)
    before = {n: b for n, b in tree(path).items() if "/c/" in n or n.startswith("commits")}
    train = "".join(map(tokenizer.decode, cache["book"].train[:].tokens[:, 1:]))
    for row in cache["book"].validation[:].tokens:
        words = tokenizer.decode(row[1:-1])
        assert words in book
        assert words not in train

    write(folder / "book.jsonl", book, other, "short", limited)
    grown = make(folder, tokenizer, path, grow=True)
    now = tree(path)
    assert {name: now[name] for name in before} == before
    assert grown.plan("book").passages
    assert grown.plan("book").portions[1].rows["validation"] >= 10
    assert not verify(grown, quiet)
    # Token rows that were lost are made again, in both portions.
    for victim in path.glob("domains/book/*/tokens/c/**/*"):
        if victim.is_file():
            victim.unlink()
    make(folder, tokenizer, path)
    assert tree(path) == now


def test_passages_are_told_by_estimate_and_info(tokenizer: Any, tmp_path: Path) -> None:
    folder, path = tmp_path / "corpus", tmp_path / "mix.zarr"
    folder.mkdir()
    write(folder / "book.jsonl", text(0, 1000))
    write(folder / "notes.jsonl", *(text(n, 30) for n in range(1, 40)))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    make(folder, tokenizer, path)
    words = ["--tokenizer", tmp_path / "tokenizer", "--seq-len", 16, "--holdout", 0.1]
    for said in (["estimate", folder, "x", *words], ["info", path]):
        result = call(main, *said)
        assert result.exit_code == 0, result.output
        told = " ".join(result.output.split())
        assert "book: whole documents cannot meet the held-out share" in told
        assert "passages of 16 tokens" in told
        assert "notes: whole" not in told


def test_a_limit_cuts_a_long_document(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / "book.jsonl", text(0, 3000))
    (tmp_path / "mix.yaml").write_text("domains: {book: {path: book.jsonl, tokens: 800}}")
    plan = make(tmp_path / "mix.yaml", tokenizer, tmp_path / "mix.zarr").plan("book")
    assert plan.tokens == 800
    assert plan.rows("validation") == pytest.approx(5, abs=1.1)
