"""Write a small corpus from what every Python installation carries: three domains, three files.

`reference` is Python's language reference, `source` its standard library, and `arithmetic` holds
generated conversations, of which a student learns the assistant's part only. Each is kept to about
12,000 tokens, so that a CPU can run the teacher over all of them in two minutes.

    python corpus.py DIR PROMPTS TASK.jsonl

The directory PROMPTS gets questions for the teacher to answer, TASK.jsonl questions about eggs with
three choices, for lm-evaluation-harness.
"""

from __future__ import annotations

import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from ddk_cache import atomic

DOMAIN_CHARACTERS = 45_000
DOCUMENT_CHARACTERS = 1_500
CONVERSATIONS = 200
QUESTIONS = 24
PROMPTS = 48


def documents(texts: list[str]) -> Iterator[dict[str, Any]]:
    """Yield documents: texts in random order, cut at blank lines, up to the size of a domain."""
    random.Random(0).shuffle(texts)
    size, piece = 0, ""
    for paragraph in re.split(r"\n\s*\n", "\n\n".join(texts)):
        piece += paragraph + "\n\n"
        if len(piece) < DOCUMENT_CHARACTERS:
            continue
        yield {"text": piece}
        size, piece = size + len(piece), ""
        if size > DOMAIN_CHARACTERS:
            return


def problem(draw: random.Random) -> tuple[str, list[str], str]:
    """Return a question, first steps towards its answer (the right one first), and the rest."""
    boxes, each, given = draw.randint(3, 9), draw.randint(11, 40), draw.randint(2, 30)
    total = boxes * each
    question = (
        f"There are {boxes} boxes with {each} eggs in each. {given} eggs are given away. "
        "How many eggs are left?"
    )
    steps = [
        f"{boxes} * {each} = {total}.",
        f"{boxes} + {each} = {boxes + each}.",
        f"{each} - {boxes} = {each - boxes}.",
    ]
    return question, steps, f"{total} - {given} = {total - given}. The answer is {total - given}."


def conversation(draw: random.Random) -> dict[str, Any]:
    """Return a question about eggs, and its answer step by step."""
    question, steps, rest = problem(draw)
    turns = [("user", question), ("assistant", f"{steps[0]} {rest}")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def prompts(draw: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Return questions by domain: about eggs, and about the language reference."""
    words = draw.sample(sorted(word for word in topics if word.isalpha()), PROMPTS)
    return {
        "arithmetic": [{"prompt": problem(draw)[0]} for _ in range(PROMPTS)],
        "reference": [{"prompt": f"What does “{word}” mean in Python?"} for word in words],
    }


def multiple_choice(draw: random.Random) -> dict[str, Any]:
    """Return a question about eggs, and which of three sums comes first."""
    question, steps, _ = problem(draw)
    return {"question": question, "choices": steps, "answer": 0}


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_corpus(out: Path, asked: Path, task: Path) -> None:
    """Write a JSONL file for each domain of text and of prompts, and the questions of the task."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    draw = random.Random(0)
    with atomic.whole(out) as partial:
        write(partial / "reference.jsonl", documents(list(topics.values())))
        source = [path.read_text(encoding="utf-8") for path in library]
        write(partial / "source.jsonl", documents(source))
        write(partial / "arithmetic.jsonl", (conversation(draw) for _ in range(CONVERSATIONS)))
    write(task, (multiple_choice(draw) for _ in range(QUESTIONS)))
    with atomic.whole(asked) as partial:
        for domain, lines in prompts(draw).items():
            write(partial / f"{domain}.jsonl", lines)


if __name__ == "__main__":
    make_corpus(*map(Path, sys.argv[1:]))
