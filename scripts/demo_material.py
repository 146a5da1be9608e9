"""The demo's corpus of five domains, its tokenizer and its small teacher.

Everything is made from files of the Python installation, so the demo needs no data, no network and
no GPU. The price: another installation has other packages, hence other documents and a slightly
different teacher, and losses are comparable on one machine only.

    python scripts/demo_material.py OUTDIR

makes OUTDIR/corpus and OUTDIR/teacher in about two minutes on two cores, once.
"""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import json
import math
import operator
import random
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddk_cache import atomic
from ddk_cache.build.config import BuildConfig
from ddk_cache.console import Progress, say
from ddk_cache.corpus.rows import Tally, token_rows
from ddk_cache.corpus.sources import documents, find_sources
from ddk_cache.hashing import digest
from ddk_cache.types import SPLITS, Array

SEED = 0

DOMAIN_BYTES = 600_000
"""Largest amount of text per domain in bytes."""
PIECE_BYTES = 3_000
"""Approximate size of a document."""

VOCABULARY = 4096
END = "<|endoftext|>"

HOLDOUT = 0.05
"""Share of documents that the teacher never sees; the default of `ddk-cache build`."""
SEQ_LEN = 128

MODEL = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
}
"""Small enough to train on most of the corpus in two minutes. Weights start near 1/√width: with
the usual 0.02, chosen for wide models, a run of 400 steps ended about half a nat higher."""
STEPS = 1000
ROWS = 4
"""Rows per step: few, since large batches gain little on a CPU and more steps train better."""
LR = 3e-3
WARMUP = 0.05
"""Share of the steps over which the learning rate rises."""


@dataclass(frozen=True)
class Material:
    """Where the material lies."""

    corpus: Path
    """A directory with a JSONL file for each domain."""
    teacher: Path
    """A model directory, its tokenizer included."""


def make_material(out: Path) -> Material:
    """Make corpus, tokenizer and teacher below `out`, or find what an earlier call made.

    The stamp is written last and holds the hash of this file, so whatever was stopped half-way
    or made by other settings is made again.
    """
    material, stamp = Material(out / "corpus", out / "teacher"), out / "material.json"
    made_by = digest(Path(__file__).read_bytes())
    there = all(path.exists() for path in (material.corpus, material.teacher, stamp))
    if there and json.loads(stamp.read_bytes())["made_by"] == made_by:
        return material
    stamp.unlink(missing_ok=True)
    make_corpus(material.corpus)
    losses = make_teacher(material.corpus, material.teacher)
    record = {"made_by": made_by, "held_out_loss": losses}
    atomic.replace(stamp, json.dumps(record, indent=2).encode())
    return material


# --- the corpus: what every Python installation carries -------------------------------------------


def make_corpus(corpus: Path) -> None:
    """Write a JSONL file for each domain."""
    with atomic.whole(corpus) as partial:
        for name, texts in DOMAINS.items():
            chosen = choose(texts())
            lines = "".join(json.dumps({"text": text}) + "\n" for text in chosen)
            atomic.replace(partial / f"{name}.jsonl", lines.encode())
            size = sum(len(text.encode()) for text in chosen)
            say(f"{name}: {len(chosen):,} documents, {size / 1e6:.2f} MB")


def choose(texts: Iterable[str]) -> list[str]:
    """Cut texts into documents and return those of a domain: distinct, shuffled, not too many."""
    distinct = {" ".join(piece.split()): piece for text in texts for piece in pieces(text)}
    chosen, size = list(distinct.values()), 0
    random.Random(SEED).shuffle(chosen)
    for count, document in enumerate(chosen):
        size += len(document.encode())
        if size > DOMAIN_BYTES:
            return chosen[:count]
    return chosen


def pieces(text: str) -> Iterator[str]:
    """Cut a text at blank lines into pieces of about PIECE_BYTES; none is empty."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", text):
        piece += paragraph.rstrip() + "\n\n"
        if len(piece) >= PIECE_BYTES:
            yield piece.strip("\n")
            piece = ""
    if piece.strip():
        yield piece.strip("\n")


TESTS_AND_TABLES = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
SKIPPED = TESTS_AND_TABLES | {"site-packages", "dist-packages"}


def modules() -> list[str]:
    """Return the source of the modules of the standard library, sorted by path."""
    top, found = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(top.rglob("*.py")):
        folders = set(path.relative_to(top).parts[:-1])
        if folders & SKIPPED or path.name.startswith("_sysconfigdata"):
            continue
        with tokenize.open(path) as file:
            found.append(file.read())
    return found


def source() -> list[str]:
    """Return every other module: code with its comments and docstrings."""
    return modules()[0::2]


def docstrings() -> list[str]:
    """Return the docstrings of the modules that `source` leaves out, joined for each module."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = []
    for module in modules()[1::2]:
        nodes = [node for node in ast.walk(ast.parse(module)) if isinstance(node, documented)]
        texts.append("\n\n".join(filter(None, map(ast.get_docstring, nodes))))
    return texts


def distributions() -> list[importlib.metadata.Distribution]:
    """Return the installed distributions, sorted by name."""
    return sorted(importlib.metadata.distributions(), key=lambda found: str(found.name).lower())


def packages() -> list[str]:
    """Return the long descriptions of the installed distributions."""
    return [str(found.metadata.json.get("description", "")) for found in distributions()]


def licenses() -> list[str]:
    """Return the license files of the installed distributions."""
    listed = itertools.chain.from_iterable(found.files or () for found in distributions())
    paths = [
        Path(str(file.locate()))
        for file in listed
        if re.search("licen[cs]e|copying|notice", file.name, re.IGNORECASE)
        and file.suffix in {"", ".txt", ".md", ".rst"}
    ]
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()]


# --- the corpus: arithmetic -----------------------------------------------------------------------

PROBLEMS = 3_000
NUMBERS = {"a": (2, 12), "b": (2, 12), "m": (11, 99), "n": (11, 99), "x": (100, 999)}
"""Ranges of the numbers of a problem, both ends included."""
WHO = ["Ada", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira"]
WHAT = ["apples", "books", "bottles", "buttons", "cards", "coins", "eggs", "pencils", "stamps"]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
TEMPLATES = [
    ("{who} has {m} {what} and finds {n} more. How many {what} does {who} have now?", "m + n"),
    ("There were {x} {what} in a shop. {m} are sold in the morning and {n} in the afternoon. "
     "How many {what} are left?", "x - m - n"),
    ("{who} buys {a} boxes with {m} {what} in each and gives {n} away. "
     "How many {what} does {who} keep?", "m * a - n"),
    ("{who} packs {a} bags with {b} {what} each and already has {m} {what} at home. "
     "How many {what} are there together?", "a * b + m"),
    ("{who} shares {x} {what} evenly among {a} friends, and each friend then gets {b} more. "
     "How many {what} does each friend have?", "x / a + b"),
    ("A shelf has {a} rows of {m} {what}. {who} takes {n} {what} out and puts {x} others in. "
     "How many {what} are on the shelf?", "m * a - n + x"),
    ("{who} collects {m} {what} every week for {a} weeks and then sells them in packs of {b}. "
     "How many packs does {who} sell?", "m * a / b"),
    ("A packet of {what} costs {a} euros. {who} buys {m} packets and a bag for {b} euros. "
     "How many euros does {who} pay?", "m * a + b"),
    ("{who} counts {x} {what}, loses {m} of them, and splits the rest into {a} equal piles. "
     "How many {what} are in a pile?", "x - m / a"),
    ("A train carries {x} crates of {what}. At the first stop {m} are unloaded, at the second {n} "
     "are loaded. Each crate weighs {a} kilograms. How many kilograms does the train carry?",
     "x - m + n * a"),
]  # fmt: skip
"""A question and its solution: from left to right, one step per operation."""


def arithmetic() -> Iterator[str]:
    """Return word problems with worked answers; no step leaves the whole numbers above zero."""
    draw = random.Random(SEED)
    drawn = (solve(*draw.choice(TEMPLATES), draw) for _ in itertools.count())
    return itertools.islice(filter(None, drawn), PROBLEMS)


def solve(question: str, program: str, draw: random.Random) -> str | None:
    """Fill a template with numbers and work it out; None if they do not fit."""
    numbers = {name: draw.randint(*ends) for name, ends in NUMBERS.items()}
    first, *rest = program.split()
    value, steps = numbers[first], []
    for sign, name in zip(rest[0::2], rest[1::2], strict=True):
        result = OPERATIONS[sign](value, numbers[name])
        if result <= 0 or (sign == "/" and value % numbers[name]):
            return None
        steps.append(f"{value} {sign} {numbers[name]} = {result}.")
        value = result
    asked = question.format(who=draw.choice(WHO), what=draw.choice(WHAT), **numbers)
    return f"Question: {asked}\nAnswer: {' '.join(steps)} The answer is {value}."


DOMAINS: dict[str, Callable[[], Iterable[str]]] = {
    "arithmetic": arithmetic,
    "docstrings": docstrings,
    "licenses": licenses,
    "packages": packages,
    "source": source,
}


# --- the tokenizer and the teacher ----------------------------------------------------------------


def train_tokenizer(corpus: Path) -> Any:
    """Return a byte-level BPE tokenizer of the corpus. Digits stay single, so that sums line up."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    texts = (text for domain in find_sources(corpus) for text in documents(domain))
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END
    )


def read_rows(corpus: Path, tokenizer: Any) -> dict[str, dict[str, Array]]:
    """Return the token rows (R, S+1) of each split and domain."""
    rows: dict[str, dict[str, Array]] = {split: {} for split in SPLITS}
    spec = BuildConfig(seq_len=SEQ_LEN, holdout=HOLDOUT).spec(len(tokenizer), {}, {})
    for domain in find_sources(corpus):
        blocks: dict[str, list[Array]] = {split: [] for split in SPLITS}
        tally = Tally()
        for split, arrays in token_rows(domain, tokenizer, spec, block=1024, tally=tally):
            blocks[split].append(arrays["tokens"])
        for split in SPLITS:
            rows[split][domain.name] = np.concatenate(blocks[split])
        say(f"{domain.name}: {tally.tokens:,} tokens")
    return rows


def make_teacher(corpus: Path, teacher: Path) -> dict[str, float]:
    """Train and save a teacher with its tokenizer; return its held-out losses by domain."""
    from transformers.utils import logging

    tokenizer = train_tokenizer(corpus)
    rows = read_rows(corpus, tokenizer)
    model = new_model(tokenizer.eos_token_id)
    train(model, np.concatenate(list(rows["train"].values())))
    losses = {name: held_out_loss(model, tokens) for name, tokens in rows["validation"].items()}
    say("held-out loss: " + ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()))
    logging.disable_progress_bar()  # ours has said it all
    with atomic.whole(teacher) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return losses


def new_model(end: int) -> Any:
    """Return an untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        **MODEL,
    )
    return LlamaForCausalLM(config)


def train(model: Any, rows: Array) -> None:
    """Train a model on rows in random order for STEPS steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = shuffled(len(rows))
    model.train()
    with Progress("training the teacher", STEPS, "steps") as progress:
        for _ in range(STEPS):
            batch = rows[[next(order) for _ in range(ROWS)]]
            loss = next_token_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(1, f"loss {loss.item():.2f}")
    model.eval()


def rate(step: int) -> float:
    """Return the share of the learning rate at a step: a warm-up, then half a cosine."""
    done = step / STEPS
    return min(done / WARMUP + 1 / STEPS, 0.5 + 0.5 * math.cos(math.pi * done))


def shuffled(count: int) -> Iterator[int]:
    """Yield the numbers below `count` in random order, again and again."""
    random_order = np.random.default_rng(SEED)
    while True:
        yield from random_order.permutation(count)


def next_token_loss(model: Any, rows: Array) -> torch.Tensor:
    """Return the mean cross-entropy of rows (R, S+1), in nats."""
    tokens = torch.from_numpy(rows)
    logits_BSV = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Any, rows: Array) -> float:
    """Return the mean cross-entropy of rows that the model was not trained on."""
    batches = np.array_split(rows, -(-len(rows) // 64))
    total = sum(next_token_loss(model, batch).item() * len(batch) for batch in batches)
    return total / len(rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/demo_material.py OUTDIR")
    print(make_material(Path(sys.argv[1])))
