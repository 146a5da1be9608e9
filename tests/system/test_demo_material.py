"""The demo's corpus: enough distinct documents in each domain, the same ones every time."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import demo_material as demo
import pytest

from ddk_cache.corpus.rows import content, split_of


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    return {name: demo.choose(texts()) for name, texts in demo.DOMAINS.items()}


@pytest.mark.parametrize("domain", demo.DOMAINS)
def test_a_domain_has_enough_distinct_documents(domain: str, corpus: dict[str, list[str]]) -> None:
    documents = corpus[domain]
    assert len(documents) >= 60
    assert len({" ".join(document.split()) for document in documents}) == len(documents)
    assert all(document.strip() for document in documents)
    assert sum(len(document.encode()) for document in documents) <= demo.DOMAIN_BYTES


@pytest.mark.parametrize("domain", demo.DOMAINS)
def test_several_documents_of_a_domain_are_held_out(
    domain: str, corpus: dict[str, list[str]]
) -> None:
    splits = Counter(split_of(content(document), demo.HOLDOUT) for document in corpus[domain])
    assert splits["validation"] >= 3
    # Which documents there are depends on the machine, and each is held out with this probability.
    expected = demo.HOLDOUT * splits.total()
    assert abs(splits["validation"] - expected) < 5 * expected**0.5


@pytest.mark.parametrize("domain", demo.DOMAINS)
def test_a_domain_is_the_same_every_time(domain: str, corpus: dict[str, list[str]]) -> None:
    assert demo.choose(demo.DOMAINS[domain]()) == corpus[domain]


def test_domains_differ(corpus: dict[str, list[str]]) -> None:
    frequent = {
        name: {word for word, _ in Counter(re.findall(r"\w+", " ".join(texts))).most_common(40)}
        for name, texts in corpus.items()
    }
    for one, other in itertools.combinations(frequent, 2):
        assert len(frequent[one] & frequent[other]) < 30, (one, other)


def test_arithmetic_is_right() -> None:
    for problem in itertools.islice(demo.arithmetic(), 500):
        question, answer = problem.split("\nAnswer: ")
        asked = {int(number) for number in re.findall(r"\d+", question)}
        *steps, stated = answer.split(". ")
        value = None
        for step in steps:
            left, sign, right, result = re.fullmatch(r"(\d+) (.) (\d+) = (\d+)", step).groups()  # type: ignore[union-attr]
            assert int(left) == value or (value is None and int(left) in asked)
            assert int(right) in asked
            value = int(result)
            # Division is checked as the product it undoes, so a remainder cannot hide.
            whole, parts = (
                (result, f"{left} {sign} {right}") if sign != "/" else (left, f"{result} * {right}")
            )
            assert int(whole) == eval(parts), problem
        assert stated == f"The answer is {value}."


def test_pieces_keep_the_text_and_its_paragraphs() -> None:
    paragraphs = [f"paragraph {number} " + "x" * 500 for number in range(30)]
    cut = list(demo.pieces("\n \n".join(paragraphs)))
    assert "\n\n".join(cut).split("\n\n") == paragraphs
    assert all(len(piece) <= demo.PIECE_BYTES + 520 for piece in cut)
    assert list(demo.pieces(" \n\n ")) == []


def test_material_is_made_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def make_corpus(corpus: Path) -> None:
        calls.append("corpus")
        corpus.mkdir(exist_ok=True)

    def make_teacher(corpus: Path, teacher: Path) -> dict[str, float]:
        calls.append("teacher")
        teacher.mkdir(exist_ok=True)
        return {"source": 1.0}

    monkeypatch.setattr(demo, "make_corpus", make_corpus)
    monkeypatch.setattr(demo, "make_teacher", make_teacher)
    made = demo.make_material(tmp_path)
    assert demo.make_material(tmp_path) == made
    assert calls == ["corpus", "teacher"]
    monkeypatch.setattr(demo, "digest", lambda _: "another")
    demo.make_material(tmp_path)
    assert calls == ["corpus", "teacher"] * 2
