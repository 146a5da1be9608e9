"""Corpora for the measurement of domain weights: as they are, and with head-room for a rule.

A rule can beat even weights only where these are visibly wrong. Three mixes are: domains that are
learned early and need no more rows (`saturating`), small domains that even weights repeat
(`scarce`), and a domain that no student can learn, whose gap stays (`noise`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import yaml

MIXES = ("plain", "saturating", "scarce", "noise")

SCARCE = 30
"""Ratio of the sizes of large and small domains in the mix `scarce`; every second one is small."""

SENTENCES = 20
"""Different sentences in the repeated text."""


def write_mix(folder: Path, corpus: Path, mix: str, tokens: int) -> Path:
    """Write a mix file, and the documents that it adds; domains get shares of so many tokens.

    Shares follow the bytes of each file of `corpus`; in `scarce` they are 1 or 30.
    """
    sizes = {file.stem: pq.read_table(file)["text"].nbytes for file in corpus.glob("*.parquet")}
    paths = {name: corpus / f"{name}.parquet" for name in sorted(sizes)}
    shares: dict[str, float] = {name: sizes[name] for name in paths}
    if mix == "scarce":
        shares = {name: 1 if n % 2 else SCARCE for n, name in enumerate(paths)}
    average = sum(shares.values()) / len(shares)
    for name, texts in made(corpus, mix).items():
        paths[name], shares[name] = folder / f"{name}.jsonl", average
        enough = islice(texts, tokens // 100)
        lines = (json.dumps({"text": text}) + "\n" for text in enough)
        paths[name].write_text("".join(lines))
    total = sum(shares.values())
    domains = {
        name: {"path": str(path), "tokens": round(tokens * shares[name] / total)}
        for name, path in paths.items()
    }
    path = folder / f"{mix}.yaml"
    path.write_text(yaml.safe_dump({"domains": domains}))
    return path


def made(corpus: Path, mix: str) -> Mapping[str, Iterator[str]]:
    """Return the endless documents of the domains that a mix adds."""
    dice = random.Random(0)
    if mix == "saturating":
        return {"sums": sums(dice), "refrain": refrain(dice, words_of(corpus))}
    return {"shuffled": shuffled(dice, words_of(corpus))} if mix == "noise" else {}


def words_of(corpus: Path) -> list[str]:
    """Return the words of a quarter of a million characters of the first domain."""
    texts = pq.read_table(min(corpus.glob("*.parquet")))["text"].to_pylist()
    return " ".join(texts)[:250_000].split()


def sums(dice: random.Random) -> Iterator[str]:
    """Yield documents of forty sums."""
    while True:
        pairs = [(dice.randrange(100), dice.randrange(100)) for _ in range(40)]
        yield "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)


def refrain(dice: random.Random, words: list[str]) -> Iterator[str]:
    """Yield documents of thirty sentences, all out of a few."""
    starts = [dice.randrange(len(words) - 12) for _ in range(SENTENCES)]
    known = [" ".join(words[start : start + 12]) + "." for start in starts]
    while True:
        yield " ".join(dice.choices(known, k=30))


def shuffled(dice: random.Random, words: list[str]) -> Iterator[str]:
    """Yield documents of words without any order."""
    while True:
        yield " ".join(dice.choices(words, k=300))
