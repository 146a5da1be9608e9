"""The job: prompts and a model → a corpus of responses, batch by batch.

    OUT/<domain>/000000.parquet     one batch of responses; a folder is there when it is whole
    OUT/.generate/plan.json         the settings, and a hash of the prompts of each domain
    OUT/.generate/parts/            batches of domains that are not whole

The plan fixes which prompts share a batch: those of a domain, sorted by length. So a batch is a
function of the plan, and neither a restart nor the number of processes changes a byte; a process
that is killed loses the batch that it was at. The price is that each process reads and tokenizes
all prompts and holds their tokens in memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from ddk_cache import atomic
from ddk_cache.build.share import check_rank, share
from ddk_cache.console import Progress
from ddk_cache.corpus.sources import Source, find_sources
from ddk_cache.errors import DDKError, InputError, MismatchError
from ddk_cache.format.documents import dump, parse
from ddk_cache.hf import identify_tokenizer
from ddk_cache.rng import key_of
from ddk_cache.sequences.config import SamplingConfig
from ddk_cache.sequences.decode import Responder, Response, respond
from ddk_cache.sequences.prompts import METADATA, Prompt, encoded, read_prompts
from ddk_cache.storage.lease import Leases
from ddk_cache.storage.local import LocalStorage

WORK = ".generate"
"""The folder of unfinished work; hidden, so that a corpus has no domain of this name."""

PLAN, PARTS = "plan.json", "parts"

COLUMNS = [
    ("number", pa.int64()),
    ("sample", pa.int32()),
    ("prompt", pa.string()),
    ("response", pa.string()),
    ("prompt_ids", pa.list_(pa.int32())),
    ("response_ids", pa.list_(pa.int32())),
    ("logprob", pa.float64()),
    ("length", pa.int32()),
    ("ended", pa.string()),
]
"""One row per response. `number` is the place of the prompt in its domain, `prompt` its text (of a
conversation, the last message), `logprob` the sum of the log-probabilities of `response_ids` (nats,
full vocabulary, temperature 1), `length` their number, `ended` is stop or length."""

MESSAGES = ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))
"""The conversation with the response, where the tokenizer has a chat template."""


def generate(
    prompts: str | Path | Sequence[Source],
    out: str | Path,
    responder: Responder,
    config: SamplingConfig = SamplingConfig(),  # noqa: B008 (it is frozen)
    *,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Let a model answer the prompts of a corpus, or resume a job that was stopped.

    Args:
        prompts: A corpus with a column `prompt`, or `messages` that end with the user's turn.
        out: Directory that becomes a corpus of the responses, with the same domains.
        responder: From `load_responder`.
        config: How to sample.
        rank: Which process this is, of `world`. It only spreads processes over the work.
        world: The number of processes that were given the same call.

    Raises:
        InputError: a prompt is missing or too long, or `out` holds something else.
        MismatchError: `out` was begun with other settings; each is named.
    """
    check_rank(rank, world)
    sources = find_sources(prompts) if isinstance(prompts, str | Path) else prompts
    answer(Path(out), {s.name: list(read_prompts(s)) for s in sources}, sources, responder, config,
           rank, world)  # fmt: skip


def answer(
    out: Path,
    prompts: Mapping[str, Sequence[Prompt]],
    sources: Sequence[Source],
    responder: Responder,
    config: SamplingConfig,
    rank: int,
    world: int,
) -> None:
    """Answer the prompts of each domain, without regard to the responses that came with them."""
    work = {
        source.name: Asked.of(source, prompts[source.name], responder, config) for source in sources
    }
    storage = LocalStorage(out / WORK)
    settings = identity(responder, config)
    contents = {f"prompts of {name}": asked.content for name, asked in work.items()}
    begin(out, storage, settings | contents)
    leases = Leases(storage)
    with Progress("responses", 0, "responses") as progress:
        job = Generating(out, storage, leases, work, responder, config, settings, progress)
        progress.total = sum(len(work[item.domain].batch(item.number)) for item in job.todo())
        try:
            share(job, leases, rank, world)
        except KeyboardInterrupt:
            left = len(job.todo())
            raise DDKError(
                f"stopped: {left:,} of {len(job.items):,} batches are left. Run the same command "
                "again to resume."
            ) from None
        finally:
            leases.release_all()
            storage.clean_up()
    job.finish()


def identity(responder: Responder, config: SamplingConfig) -> dict[str, Any]:
    """Return what the bytes of the responses follow from, besides the prompts."""
    tokenizer = identify_tokenizer(responder.tokenizer)
    return {
        **config.to_json(),
        "model": dict(responder.identity),
        "tokenizer": tokenizer,
        "stops": sorted(responder.stops),
    }


def begin(out: Path, storage: LocalStorage, asked: Mapping[str, Any]) -> None:
    """Write the plan of a new job, or compare it with the one that is there.

    Raises:
        InputError: the directory holds something else.
        MismatchError: the job was begun with other settings.
    """
    if out.is_file() or (out.is_dir() and not storage.exists(PLAN) and _foreign(out)):
        raise InputError(f"{out} exists and is not a directory of responses. Give another path.")
    storage.put_if_absent(PLAN, dump({"settings": asked}))
    was = parse(storage.get(PLAN) or b"", storage.uri(PLAN))["settings"]
    now = json.loads(json.dumps(asked))
    differences = [
        f"  {name}: it has {was.get(name)}, this call asks for {now.get(name)}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]
    if differences:
        raise MismatchError(
            f"{out} was begun with other settings or prompts:\n"
            + "\n".join(differences)
            + "\nUse another directory, or the original values."
        )


def _foreign(out: Path) -> bool:
    """Return whether a directory holds something that is not the beginning of a job."""
    return any(path.name != WORK for path in out.iterdir())


@dataclass(frozen=True)
class Asked:
    """The prompts of a domain with their tokens, and which of them share a batch."""

    prompts: Sequence[Prompt]
    ids: Sequence[Sequence[int]]
    order: Sequence[tuple[int, int]]
    """(number of the prompt, number of the sample), by length of the prompt."""
    size: int
    """Responses of a batch."""

    @classmethod
    def of(
        cls,
        source: Source,
        prompts: Sequence[Prompt],
        responder: Responder,
        config: SamplingConfig,
    ) -> Asked:
        """Tokenize prompts and sort them by length.

        Raises:
            InputError: a prompt cannot be tokenized, or leaves no room for a response.
        """
        most = responder.positions

        def encode(prompt: Prompt) -> list[int]:
            ids = prompt.encode(responder.tokenizer)
            if most is not None and len(ids) + config.max_new_tokens > most:
                raise InputError(
                    f"got {len(ids):,} tokens and up to {config.max_new_tokens:,} new ones, "
                    f"expected at most {most:,} together, the positions of {responder.name!r}. "
                    "Lower --max-new-tokens, or remove the prompt."
                )
            return ids

        ids = list(encoded(source, prompts, encode))
        by_length = sorted(range(len(ids)), key=lambda number: (len(ids[number]), number))
        order = [(number, sample) for number in by_length for sample in range(config.samples)]
        return cls(prompts, ids, order, config.batch)

    @property
    def batches(self) -> int:
        """Return the number of batches."""
        return -(-len(self.order) // self.size)

    def batch(self, number: int) -> Sequence[tuple[int, int]]:
        """Return (prompt, sample) of the responses of a batch."""
        return self.order[number * self.size :][: self.size]

    @property
    def content(self) -> str:
        """Return a hash of the prompts in order."""
        state = xxhash.xxh3_128()
        for prompt in self.prompts:
            state.update(prompt.hash.encode())
        return state.hexdigest()


class Batch(NamedTuple):
    """One batch of a domain."""

    domain: str
    number: int


@dataclass
class Generating:
    """A job whose items are the batches that are not written."""

    out: Path
    storage: LocalStorage
    leases: Leases
    work_of: Mapping[str, Asked]
    responder: Responder
    config: SamplingConfig
    settings: Mapping[str, Any]
    progress: Progress
    items: list[Batch] = field(init=False)
    tokens: int = 0
    """Tokens that this process has written."""
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.items = [
            Batch(name, number)
            for name, asked in self.work_of.items()
            for number in range(asked.batches)
        ]

    def todo(self) -> list[Batch]:
        """Return the batches that are not written."""
        return [item for item in self.items if not self.done(item)]

    def done(self, item: Batch) -> bool:
        """Return whether a batch is written: in the work folder, or in a domain that is whole."""
        return self.storage.exists(file_name(item)) or (self.out / item.domain).exists()

    def lease(self, item: Batch) -> str:
        """Return the name of the lease on a batch."""
        return f"{item.domain}.{item.number}"

    def work(self, item: Batch) -> None:
        """Write the responses of a batch, and release its lease."""
        asked = self.work_of[item.domain]
        chosen = asked.batch(item.number)
        keys = [
            key_of("response", self.config.seed, asked.prompts[number].hash, sample)
            for number, sample in chosen
        ]
        ids = [asked.ids[number] for number, _ in chosen]
        responses = respond(self.responder, ids, keys, self.config, self.advance)
        rows = [
            self.row(asked.prompts[number], number, sample, prompt_ids, response)
            for (number, sample), prompt_ids, response in zip(chosen, ids, responses, strict=True)
        ]
        self.storage.put(file_name(item), self.table(rows))
        self.leases.release(self.lease(item))
        speed = self.tokens / max(time.monotonic() - self.began, 1e-9)
        self.progress.advance(len(rows), f"{item.domain}  {speed:,.0f} tokens/s")

    def advance(self, tokens: int) -> None:
        """Count tokens as written, and renew the leases that are held."""
        self.leases.beat()
        self.tokens += tokens

    def flush(self) -> None:
        """Do nothing: a batch is written when `work` returns."""

    def row(
        self, prompt: Prompt, number: int, sample: int, prompt_ids: Sequence[int], found: Response
    ) -> dict[str, Any]:
        """Return the row of one response."""
        ids = [token for token in found.ids if token not in self.responder.stops]
        text = self.responder.tokenizer.decode(ids, skip_special_tokens=True)
        row = {
            "number": number,
            "sample": sample,
            "prompt": prompt.messages[-1]["content"],
            "response": text,
            "prompt_ids": prompt_ids,
            "response_ids": found.ids,
            "logprob": found.logprob,
            "length": len(found.ids),
            "ended": found.ended,
        }
        if self.responder.tokenizer.chat_template:
            row["messages"] = [*prompt.messages, {"role": "assistant", "content": text}]
        return row

    def table(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        """Return a Parquet file of rows."""
        columns = [MESSAGES, *COLUMNS] if "messages" in rows[0] else COLUMNS
        metadata = {METADATA: json.dumps(self.settings, sort_keys=True).encode()}
        made = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(columns, metadata)), made)
        return made.getvalue()

    def finish(self) -> None:
        """Move the folder of each domain to its place, where it becomes a part of the corpus."""
        for name in self.work_of:
            whole, parts = self.out / name, self.storage.root / PARTS / name
            if not whole.exists():
                with contextlib.suppress(FileNotFoundError, FileExistsError):  # another moved it
                    parts.rename(whole)
            shutil.rmtree(parts, ignore_errors=True)  # a batch that two processes wrote
        atomic.sync(self.out)


def file_name(item: Batch) -> str:
    """Return the name of the file of a batch, below the work folder."""
    return f"{PARTS}/{item.domain}/{item.number:06}.parquet"
