"""What a teacher's loss on conversations is: each alone, joined and cut, or apart in rows.

A row of joined conversations begins inside of one and shows the teacher others before it, which a
chat model never sees in use. The first word problems of the corpus, as question and answer, go
through the teacher in the three ways, and once through a build; the loss is that on the answers.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import torch

from benches.common import Record, data, json_option
from ddk_cache import BuildConfig, InputError, Teacher, build_cache, load_teacher, open_cache
from ddk_cache.corpus.document import Conversation
from ddk_cache.corpus.packing import DocumentPacker, Packer, StreamPacker
from ddk_cache.corpus.rows import encode
from ddk_cache.hf import load_tokenizer
from ddk_cache.isolation import positions_of
from ddk_cache.types import Array


@dataclass
class Corpus:
    """Conversations, their tokens in one list, and where each of them lies."""

    talks: list[list[dict[str, str]]]
    tokens: Array
    counted: Array
    begins: list[int]

    def alone(self, teacher: Teacher, place: int) -> tuple[int, torch.Tensor]:
        """Return where the conversation that has a token begins, and its logits, by itself."""
        number = int(np.searchsorted(self.begins, place, "right")) - 1
        begin, end = self.begins[number], [*self.begins, len(self.tokens)][number + 1]
        return begin, teacher(torch.from_numpy(self.tokens[None, begin : end - 1]))[0].float()


def conversations(tokenizer: Any, count: int | None) -> Corpus:
    """Return the first word problems, or all, as questions and answers."""
    column = pq.read_table(data() / "corpus" / "math_word.parquet")["text"]
    talks, tokens, counted, begins = [], list[int](), list[bool](), []
    for text in column.to_pylist()[:count]:
        question, answer = text.removeprefix("Question: ").split("\nAnswer: ", 1)
        turns = (("user", question), ("assistant", answer))
        talks.append([{"role": role, "content": content} for role, content in turns])
        (((ids, flags),),) = encode(tokenizer, [Conversation(talks[-1])])
        begins.append(len(tokens))
        tokens += ids
        counted += flags
    return Corpus(talks, np.array(tokens), np.array(counted), begins)


def packed(corpus: Corpus, packer: Packer) -> dict[str, Array]:
    """Return the rows of a packer, with places in the list of tokens in the place of tokens."""
    for begin, end in zip(corpus.begins, [*corpus.begins[1:], len(corpus.tokens)], strict=True):
        packer.add((list(range(begin, end)), corpus.counted[begin:end].tolist()))
    packer.finish()
    return packer.take(packer.rows)


def compared(
    corpus: Corpus, teacher: Teacher, rows: dict[str, Array], padding: int
) -> Iterator[tuple[float, float, float]]:
    """Yield for each counted label its loss in the row and alone, and KL(alone ‖ row), nats."""
    tokens = np.append(corpus.tokens, padding)[rows["tokens"]]
    for row, places in enumerate(rows["tokens"]):
        positions = None
        if "segments" in rows:
            positions = positions_of(torch.from_numpy(rows["segments"][row : row + 1, :-1]))
        logits = teacher(torch.from_numpy(tokens[row : row + 1, :-1]), positions)[0].float()
        (labels,) = np.nonzero(rows["loss_mask"][row])
        begin, mine = -1, torch.empty(0)
        for label in labels.tolist():
            place, token = int(places[label + 1]), int(tokens[row, label + 1])
            if not 0 <= place - 1 - begin < len(mine) or begin < 0:
                begin, mine = corpus.alone(teacher, place)
            t, q = mine[place - 1 - begin].log_softmax(-1), logits[label].log_softmax(-1)
            yield -float(q[token]), -float(t[token]), float((t.exp() * (t - q)).sum())


def built(corpus: Corpus, teacher: Teacher, tokenizer: Any, seq_len: int) -> float:
    """Return the teacher's loss that a cache of the conversations holds, nats per counted token."""
    with tempfile.TemporaryDirectory() as folder:
        lines = (json.dumps({"messages": talk}) + "\n" for talk in corpus.talks)
        (Path(folder) / "corpus").mkdir()
        (Path(folder) / "corpus" / "talk.jsonl").write_text("".join(lines))
        config = BuildConfig(seq_len=seq_len, holdout=0.0, batch_rows=1, shard_rows=16)
        path = Path(folder) / "mix.zarr"
        build_cache(path, Path(folder) / "corpus", teacher, tokenizer, config)
        with open_cache(path) as cache:
            return cache["talk"].train.teacher_loss or float("nan")


def paddings(tokenizer: Any) -> list[dict[str, Any]]:
    """Return the share of padding of all word problems, in rows of several lengths."""
    corpus, found = conversations(tokenizer, None), []
    for seq_len in (256, 512, 1024, 2048):
        began = time.process_time()
        rows = packed(corpus, DocumentPacker(seq_len, "split", len(corpus.tokens)))
        found.append(
            {
                "positions in a row": seq_len,
                "rows": len(rows["tokens"]),
                "padding": float((rows["segments"] == 0).mean()),
                "tokens per CPU second": len(corpus.tokens) / (time.process_time() - began),
            }
        )
    return found


@click.command(help=__doc__.splitlines()[0] if __doc__ else "")
@click.option("--teacher", "name", default=lambda: os.environ.get("DDK_REAL_TEACHER", ""),
              help="Directory of a chat model.  [default: DDK_REAL_TEACHER]")  # fmt: skip
@click.option("--conversations", "count", default=24, show_default=True, help="Number of them.")
@click.option("--seq-len", default=256, show_default=True, help="Positions in a row.")
@json_option
@torch.inference_mode()
def main(name: str, count: int, seq_len: int, json_path: Path | None) -> None:
    """Print the table."""
    if not name:
        raise InputError("set DDK_REAL_TEACHER, or give --teacher, a chat model.")
    settings = {"conversations": count, "seq_len": seq_len}
    record = Record("packing", settings, ["torch", "transformers"])
    tokenizer, teacher = load_tokenizer(name), load_teacher(name)
    corpus, table = conversations(tokenizer, count), []
    longer = sum(np.diff([*corpus.begins, len(corpus.tokens)]) > seq_len + 1)
    packers: dict[str, Packer] = {
        "joined and cut (stream)": StreamPacker(seq_len),
        "apart (documents)": DocumentPacker(seq_len, "split", len(corpus.tokens)),
    }
    for way, packer in packers.items():
        rows = packed(corpus, packer)
        end = int(tokenizer.eos_token_id)
        loss, alone, kl = np.array(list(compared(corpus, teacher, rows, end))).T
        table.append(
            {
                "way": way,
                "rows": len(rows["tokens"]),
                "padding": float((rows.get("segments", np.ones(1)) == 0).mean()),
                "counted": len(loss),
                "loss": loss.mean(),
                "alone": alone.mean(),
                "KL(alone ‖ row)": kl.mean(),
                "largest difference": float(np.abs(loss - alone).max()),
            }
        )
    table.append({"way": "cache", "loss": built(corpus, teacher, tokenizer, seq_len)})
    title = f"Teacher on {count} conversations, {longer} of them longer than a row, nats"
    record.table(title, table)
    record.table("Padding of all word problems", paddings(tokenizer))
    record.write(json_path)


if __name__ == "__main__":
    main()
