"""Write a small corpus from what every Python installation carries: three domains, three files.

`reference` is Python's language reference, `source` its standard library, and `arithmetic` holds
generated conversations, of which a student learns the assistant's part only. Each is kept to about
12,000 tokens, so that a CPU can run the teacher over all of them in two minutes.

    python corpus.py DIR
"""

from __future__ import annotations

import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from ddk_cache import atomic

DOMAIN_CHARACTERS = 45_000
DOCUMENT_CHARACTERS = 1_500
CONVERSATIONS = 200


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


def conversation(draw: random.Random) -> dict[str, Any]:
    """Return a question about three numbers, and its answer step by step."""
    boxes, each, given = draw.randint(3, 9), draw.randint(11, 40), draw.randint(2, 30)
    total = boxes * each
    question = (
        f"There are {boxes} boxes with {each} eggs in each. {given} eggs are given away. "
        "How many eggs are left?"
    )
    answer = f"{boxes} * {each} = {total}. {total} - {given} = {total - given}. "
    turns = [("user", question), ("assistant", f"{answer}The answer is {total - given}.")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def make_corpus(out: Path) -> None:
    """Write a JSONL file for each domain."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    draw = random.Random(0)
    domains = {
        "reference": documents(list(topics.values())),
        "source": documents([path.read_text(encoding="utf-8") for path in library]),
        "arithmetic": (conversation(draw) for _ in range(CONVERSATIONS)),
    }
    with atomic.whole(out) as partial:
        for name, lines in domains.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (partial / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    make_corpus(Path(sys.argv[1]))
