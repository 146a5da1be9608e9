"""Make a cache of what others have written: a survey, the plan, then shards like those of a build.

The files are read twice: once to learn how many rows and entries there are and which token each
distribution is of, once to write. So the plan stands before the first shard, and an import that was
stopped resumes with the same call, at the price of a second reading. Documents follow one another
in rows, as in a build; the position between two of them counts nothing.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ddk_cache.build.audit import audit
from ddk_cache.build.config import BuildConfig
from ddk_cache.build.create import tokenizer_files
from ddk_cache.build.tokenize import FREQUENT
from ddk_cache.build.writer import ShardWriter
from ddk_cache.console import Progress
from ddk_cache.corpus.rows import split_of
from ddk_cache.errors import InputError
from ddk_cache.format.codec import TargetCodec
from ddk_cache.format.commit import Record
from ddk_cache.format.layout import ROOT, record_name, tokenizer_name
from ddk_cache.format.manifest import Manifest, Root, create_root, write_plan
from ddk_cache.format.place import check_place
from ddk_cache.format.plan import DomainPlan, Portion, ShardKey
from ddk_cache.format.spec import check_name
from ddk_cache.hashing import digest
from ddk_cache.hf import identify_tokenizer
from ddk_cache.storage.open import open_storage
from ddk_cache.transfer.arrange import Scored, arrange, hits
from ddk_cache.transfer.copy import check_target
from ddk_cache.transfer.formats import find_files, read_given
from ddk_cache.types import SPLITS, Array

log = logging.getLogger(__name__)


def import_cache(
    source: str | Path,
    cache: str | Path,
    tokenizer: Any,
    config: BuildConfig = BuildConfig(),  # noqa: B008 (it is frozen)
    *,
    domain: str = "",
    vocab_size: int | None = None,
) -> None:
    """Write a cache of one domain from files with a teacher's log-probabilities, or resume that.

    Args:
        source: A file or a folder of one domain, in a format of `ddk_cache.transfer.formats`.
        cache: Where the cache is, or shall be. `copy_cache` makes one cache of several.
        tokenizer: The teacher's tokenizer.
        config: Rows, shards and held-out share; its `targets` are what the files have.
        domain: Name of the domain; by default that of the source.
        vocab_size: Width of the teacher's output; by default the size of the tokenizer.

    Raises:
        InputError: the files are of no known format, or do not fill a row.
        MismatchError: the place holds another cache.
        CacheError: what is given is not a distribution.
    """
    path = Path(source)
    name = check_name(domain or path.name.split(".")[0])
    width = vocab_size or 1 + max(tokenizer.get_vocab().values())
    files = find_files(path)
    survey = look(files, width, config.holdout)
    spec = dataclasses.replace(config, targets=f"topk:{survey.size}:1.0", temperatures=()).spec(
        width, {"class": "imported", "format": survey.kind}, identify_tokenizer(tokenizer)
    )
    storage = open_storage(cache)
    store = ShardWriter(storage, spec)
    contents = tokenizer_files(tokenizer)
    root = Root(
        spec=spec,
        batch_rows=1,
        sources={name: {"imported": survey.kind, "files": [file.name for file in files]}},
        tokenizer_files={file: (len(data), digest(data)) for file, data in contents.items()},
        provenance={
            "teacher": f"imported from {path.name}",
            "tokenizer": str(tokenizer.name_or_path),
            "label_logprob": f"unknown at {survey.missing:,} of {survey.counted:,} positions",
            "most_mass": f"{survey.most_mass:.6f}",
        },
    )
    plan = write_documents(store, name, root, survey.plan(spec.seq_len), contents)
    with Progress("importing", survey.tokens, "tokens") as progress:
        for key, block in blocks(files, survey, store, name):
            if not storage.exists(record_name(key)):
                write_shard(store, plan, key, block)
            progress.advance(len(block.tokens))
    storage.clean_up()
    if survey.missing:
        log.info(
            "%s: the true token is not an entry at %.1f %% of the counted positions; its "
            "log-probability there is the largest that is possible.",
            path,
            100 * survey.missing / survey.counted,
        )


@dataclass
class Survey:
    """What the files hold."""

    kind: str = ""
    own: bool = True
    """Whether distribution i is that of token i, and not of token i + 1."""
    size: int = 1
    """The most entries of a position."""
    documents: int = 0
    tokens: int = 0
    counted: int = 0
    missing: int = 0
    """Counted positions whose true token is not an entry."""
    most_mass: float = 0.0
    content: str = ""
    per_split: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    """Tokens of each split."""
    frequent: tuple[int, ...] = ()
    holdout: float = 0.0
    width: int = 0

    def plan(self, seq_len: int) -> DomainPlan:
        """Return the plan of the domain, without its Zarr documents."""
        rows = {split: max(tokens - 1, 0) // seq_len for split, tokens in self.per_split.items()}
        if not rows["train"]:
            raise InputError(
                f"got {self.per_split['train']:,} tokens of training documents, expected at least "
                f"one row of {seq_len + 1}. Give a smaller --seq-len or more documents."
            )
        portion = Portion(self.documents, self.tokens, self.content, rows)
        return DomainPlan((portion,), frequent_ids=self.frequent)


def look(files: Sequence[Path], width: int, holdout: float) -> Survey:
    """Read all documents once. Raises InputError as `read_given` and `arrange`."""
    survey, content = Survey(holdout=holdout, width=width), xxhash.xxh3_128()
    counts, this, following = np.zeros(width, np.int64), 0, 0
    both = {own: np.zeros(2, np.int64) for own in (True, False)}
    for given in read_given(files):
        if survey.kind not in ("", given.kind):
            raise InputError(
                f"got {survey.kind} and {given.kind} in one source, expected one format. Import "
                "each as a domain of its own."
            )
        survey.kind, data = given.kind, given.tokens.tobytes()
        survey.size = max(survey.size, given.ids.shape[1])
        survey.documents += 1
        survey.tokens += len(given.tokens)
        survey.per_split[split_of(data, holdout)] += len(given.tokens)
        content.update(len(data).to_bytes(8, "little") + data + given.logprobs.tobytes())
        if len(given.ids) == len(given.tokens):
            here, after = hits(given)
            this, following = this + here, following + after
        # Whose the distributions are is known at the end, so both ways are counted.
        for own, seen in both.items():
            scored, missing, mass = arrange(given, own, survey.size, width)
            seen += [int(scored.counted.sum()), missing]
            survey.most_mass = max(survey.most_mass, mass)
        counts += np.bincount(given.tokens, minlength=width)
    survey.own = this > following
    if max(this, following) < 1.2 * min(this, following):
        raise InputError(
            f"got files whose distributions have their own token as an entry {this:,} times and "
            f"the next one {following:,} times, expected one of them far more often. Give "
            "one distribution less than tokens, the first being that of the second token."
        )
    survey.counted, survey.missing = both[survey.own].tolist()
    survey.content = content.hexdigest()
    frequent = np.argsort(-counts, kind="stable")[:FREQUENT]
    survey.frequent = tuple(frequent[counts[frequent] > 0].tolist())
    return survey


def write_documents(
    store: ShardWriter, domain: str, root: Root, plan: DomainPlan, contents: Mapping[str, bytes]
) -> DomainPlan:
    """Write root, tokenizer, Zarr documents and plan, and return the plan with the documents.

    The root comes first: it makes the place one that the same call may resume.
    """
    storage = store.storage
    check_place(storage)
    if storage.exists(ROOT):
        check_target(Manifest(root, {domain: plan}), storage)
    else:
        create_root(storage, root)
    for file, data in contents.items():
        storage.put(tokenizer_name(file), data)
    plan = dataclasses.replace(plan, metadata=store.metadata(domain, plan))
    store.restore_metadata(plan)
    write_plan(storage, root.spec, domain, plan)
    return plan


def blocks(
    files: Sequence[Path], survey: Survey, store: ShardWriter, domain: str
) -> Iterator[tuple[ShardKey, Scored]]:
    """Yield the documents of each shard, joined and cut: its positions, and one token more."""
    S, most = store.spec.seq_len, store.spec.seq_len * store.spec.shard_rows
    waiting: dict[str, list[Scored]] = {split: [] for split in SPLITS}
    number = dict.fromkeys(SPLITS, 0)
    for given in read_given(files):
        split = split_of(given.tokens.tobytes(), survey.holdout)
        waiting[split].append(arrange(given, survey.own, survey.size, survey.width).scored)
        while sum(len(part.tokens) for part in waiting[split]) > most:
            whole = joined(waiting[split])
            yield ShardKey(domain, split, number[split]), cut(whole, 0, most)
            waiting[split] = [cut(whole, most, None)]
            number[split] += 1
    for split, parts in waiting.items():
        if parts:
            whole = joined(parts)
            if used := (len(whole.tokens) - 1) // S * S:
                yield ShardKey(domain, split, number[split]), cut(whole, 0, used)


def joined(parts: Sequence[Scored]) -> Scored:
    """Return documents one after another."""
    return Scored(*(np.concatenate(some) for some in zip(*parts, strict=True)))


def cut(scored: Scored, first: int, last: int | None) -> Scored:
    """Return positions first … last − 1 and, behind them, one token more."""
    more = None if last is None else last + 1
    tokens, *others = scored
    return Scored(tokens[first:more], *(part[first:last] for part in others))


def write_shard(store: ShardWriter, plan: DomainPlan, key: ShardKey, block: Scored) -> None:
    """Encode, audit, write and commit one shard."""
    S = store.spec.seq_len
    rows = len(block.ids) // S
    at = np.arange(rows)[:, None] * S + np.arange(S + 1)
    tokens: Array = block.tokens[at]
    scores = {
        name: getattr(block, name).reshape(rows, S, *getattr(block, name).shape[1:])
        for name in ("ids", "logprobs", "tail_logprob", "label_logprob")
    }
    counted = block.counted.reshape(rows, S)
    codec = TargetCodec(store.spec, plan.frequent_ids)
    encoded = codec.encode(scores, tokens[:, 1:])
    seen = audit(str(key), scores, encoded, tokens[:, 1:], codec)
    objects = store.write(key, {"tokens": tokens, "loss_mask": counted, **encoded})
    loss = -scores["label_logprob"][counted].sum(dtype=np.float64)
    Record(
        key=key,
        fingerprint=store.spec.fingerprint,
        content=plan.content,
        rows=rows,
        positions=int(counted.sum()),
        teacher_loss=float(loss),
        batch_rows=1,
        audit=seen,
        objects=objects,
    ).write(store.storage)
