"""Documents grouped by domain → rows of tokens in a stable order, with the held-out split.

Every source is read through `datasets` as a stream: nothing is copied, the first row is there at
once, and a source larger than the disk works. The price is that a domain is read from its start
each time it is planned. Which split a document belongs to follows from its content alone, so a
document never stands in both, and documents added later move nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import yaml

from ddk_cache.schema import (
    SPLITS,
    Array,
    InputError,
    MismatchError,
    canonical,
    check_name,
    unknown,
)

LOADERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
}
"""File suffix → the builder of `datasets` that reads it."""

COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}

DOCUMENTS_AT_ONCE = 256
"""Documents tokenised in one call, which the tokenizer spreads over the cores."""

Document = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the documents of one domain come from."""

    name: str
    loader: str
    """A builder of `datasets`, or the name of a data set on the hub."""
    files: tuple[str, ...] = ()
    """Local files in order; empty for the hub."""
    config: str | None = None
    split: str = "train"
    column: str | None = None
    """The column that holds the documents; by default `messages` or `text`."""
    tokens: int | None = None
    """Stop after the document that reaches this many tokens."""

    @property
    def place(self) -> str:
        """Return what to call the source in a message."""
        if not self.files:
            return f"data set {self.loader!r}"
        return self.files[0] if len(self.files) == 1 else str(Path(self.files[0]).parent)

    def describe(self) -> dict[str, Any]:
        """Return what a resumed build compares: settings, and names and sizes of local files."""
        files = [[Path(name).name, Path(name).stat().st_size] for name in self.files]
        return {
            "loader": self.loader,
            "files": files,
            "config": self.config,
            "split": self.split,
            "column": self.column,
            "tokens": self.tokens,
        }


# --- finding the domains --------------------------------------------------------------------------


def find_sources(corpus: str | Path, say: Callable[[str], None] = lambda _: None) -> list[Source]:
    """Return the domains of a corpus directory or of a YAML mix file, sorted by name.

    `say` hears of files that are no data and are left out.

    Raises:
        InputError: the corpus does not exist, names no domain, or names one twice.
    """
    path = Path(corpus)
    if path.suffix in {".yaml", ".yml"} and path.is_file():
        sources = _from_mix(path)
    elif path.is_dir():
        sources = _from_directory(path, say)
    else:
        raise InputError(f"no corpus at {path}: neither a directory nor a .yaml mix file.")
    if not sources:
        raise InputError(f"{path} holds no domain. Each file or sub-folder of data is one.")
    sources.sort(key=lambda source: source.name)
    for one, other in itertools.pairwise(sources):
        if one.name == other.name:
            raise InputError(
                f"two domains are named {one.name!r}: {one.place} and {other.place}. Rename one."
            )
    return sources


def _from_directory(path: Path, say: Callable[[str], None]) -> list[Source]:
    sources = []
    for entry in sorted(path.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() or _loader(entry):
            sources.append(_local(entry.name.partition(".")[0], entry))
        else:
            say(f"{entry.name} is left out: no {', '.join(LOADERS)} file")
    return sources


def _loader(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    return LOADERS.get(suffix)


def _local(name: str, path: Path, **settings: Any) -> Source:
    """Return the source of a file, or of all data files below a folder."""
    if not path.exists():
        raise InputError(f"domain {name!r}: there is no {path}.")
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [
        file
        for file in found
        if file.is_file() and not file.name.startswith(".") and (_loader(file) or file == path)
    ]
    loaders = {_loader(file) for file in files}
    if len(loaders) != 1 or None in loaders:
        held = ", ".join(sorted({file.suffix for file in files})) or "no data file"
        raise InputError(
            f"domain {name!r} ({path}) holds {held}; it needs files of one kind out of "
            f"{', '.join(LOADERS)}, each of them plain or compressed ({', '.join(COMPRESSED)})."
        )
    return Source(
        name=check_name(name),
        loader=str(loaders.pop()),
        files=tuple(map(str, files)),
        **settings,
    )


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings may not name a key twice (plain YAML keeps the last, silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise InputError(f"two domains or settings of one name: {', '.join(sorted(twice))}.")
        return super().construct_mapping(node, deep)


_MIX_KEYS = {"path", "dataset", "config", "split", "column", "tokens"}


def _from_mix(path: Path) -> list[Source]:
    try:
        mix = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no readable YAML: {error}") from error
    domains = mix.get("domains") if isinstance(mix, dict) else None
    if not isinstance(domains, dict):
        raise InputError(f"{path} needs a mapping 'domains:' from names to settings.")
    return [_from_entry(path, str(name), entry) for name, entry in domains.items()]


def _from_entry(mix: Path, name: str, entry: object) -> Source:
    where = f"{mix}, domain {name!r}"
    if not isinstance(entry, dict) or ("path" in entry) == ("dataset" in entry):
        raise InputError(f"{where}: give either 'path:' or 'dataset:'.")
    for key in entry:
        if key not in _MIX_KEYS:
            raise InputError(f"{where}: {unknown('setting', str(key), _MIX_KEYS)}")
    tokens = entry.get("tokens")
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        raise InputError(f"{where}: 'tokens' has to be a whole number above 0, not {tokens!r}.")
    chosen: dict[str, Any] = {
        key: str(entry[key]) for key in ("config", "split", "column") if entry.get(key) is not None
    }
    if "path" in entry:
        return _local(name, mix.parent / str(entry["path"]), tokens=tokens, **chosen)
    return Source(name=check_name(name), loader=str(entry["dataset"]), tokens=tokens, **chosen)


# --- reading documents ----------------------------------------------------------------------------


def documents(source: Source) -> Iterator[Document]:
    """Yield the documents of a source in order; empty ones are passed over.

    A folder of text files gives a document a file, a single text file one for each paragraph
    (blocks between blank lines), since one document could not be split into two sets.

    Raises:
        InputError: the source cannot be read, has no such column, or holds no document.
    """
    column, seen = source.column, False
    for record in _records(source):
        if column is None or column not in record:
            column = _column(source, record)
        value = record[column]
        if not value:
            continue
        if not isinstance(value, str | list):
            raise InputError(
                f"domain {source.name!r} ({source.place}): column {column!r} holds "
                f"{type(value).__name__}, not text or messages."
            )
        seen = True
        yield value
    if not seen:
        raise InputError(f"domain {source.name!r} ({source.place}) holds no document.")


def _records(source: Source) -> Iterator[Mapping[str, Any]]:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    options: dict[str, Any] = {"name": source.config, "split": source.split, "streaming": True}
    if source.files:
        # A local path has one split and no configuration.
        options = {"data_files": list(source.files), "split": "train", "streaming": True}
    if source.loader == "text":
        options["sample_by"] = "paragraph" if len(source.files) == 1 else "document"
    if source.loader == "csv":  # or a document that looks like a number would be one
        options |= {"converters": {source.column or "text": str}, "keep_default_na": False}
    try:
        yield from datasets.load_dataset(source.loader, **options)
    except (GeneratorExit, KeyboardInterrupt):
        raise
    except StopIteration:  # how `datasets` says that a file is empty
        return
    except Exception as error:  # each builder has errors of its own
        raise InputError(
            f"domain {source.name!r}: {source.place} cannot be read: {error}"
        ) from error


def _column(source: Source, record: Mapping[str, Any]) -> str:
    for name in [source.column] if source.column else ["messages", "text"]:
        if name in record:
            return name
    wanted = f"column {source.column!r}" if source.column else "column 'text' or 'messages'"
    raise InputError(
        f"domain {source.name!r} ({source.place}) has no {wanted}. Its columns: "
        f"{', '.join(record)}. Name one with 'column:' in a mix file."
    )


def content(document: Document) -> bytes:
    """Return the bytes that identify a document."""
    if isinstance(document, str):
        return document.encode("utf-8", "surrogatepass")
    return canonical(document)


def split_of(data: bytes, holdout: float) -> str:
    """Return the split of a document from its bytes: a share `holdout` is for validation."""
    held_out = xxhash.xxh3_64_intdigest(data) < int(holdout * 2**64)
    return SPLITS[held_out]


# --- tokens ---------------------------------------------------------------------------------------

Encoded = tuple[list[int], list[bool]]
"""The tokens of a document, and for each whether it is a label that the loss counts."""


def encode(tokenizer: Any, batch: list[Document]) -> list[Encoded]:
    """Tokenise documents, each closed by the end-of-text token.

    In a conversation only what the assistant says is counted.
    """
    texts = [document for document in batch if isinstance(document, str)]
    plain = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    ids = iter(plain)
    eos = tokenizer.eos_token_id
    encoded: list[Encoded] = []
    for document in batch:
        if isinstance(document, str):
            tokens = [*next(ids), eos]
            encoded.append((tokens, [True] * len(tokens)))
        else:
            tokens, spoken = encode_chat(tokenizer, document)
            encoded.append(([*tokens, eos], [*spoken, False]))
    return encoded


def encode_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> Encoded:
    """Tokenise a conversation by the tokenizer's chat template and mark the assistant's tokens.

    A template with `{% generation %}` marks them itself. For any other, the assistant's part of
    the text is what each of its messages adds to the conversation before it.

    Raises:
        InputError: there is no template, it refuses the messages, or it rewrites earlier turns,
            so that it cannot be said what the assistant added.
    """
    if not tokenizer.chat_template:
        raise InputError("the corpus holds 'messages', but the tokenizer has no chat template.")
    try:
        if re.search(r"{%-?\s*generation\s*-?%}", tokenizer.chat_template):
            out = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]
        text, spans = _spans(tokenizer, messages)
    except InputError:
        raise
    except Exception as error:  # jinja2 raises whatever the template asks for
        raise InputError(f"the chat template refuses a conversation: {error}") from error
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spoken = [
        any(begin <= first < end for begin, end in spans) for first, _ in out["offset_mapping"]
    ]
    return out["input_ids"], spoken


def _spans(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation; return its text and where in it the assistant speaks."""

    def render(upto: int, ask: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:upto], tokenize=False, add_generation_prompt=ask
            )
        )

    text, spans = render(len(messages)), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(index, ask=True) if index else ""
        upto = render(index + 1)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise InputError(
                "the chat template rewrites earlier turns, so the assistant's part cannot be "
                "told apart; give the template {% generation %} marks."
            )
        spans.append((len(before), len(upto)))
    return text, spans


# --- rows -----------------------------------------------------------------------------------------


@dataclass
class Packer:
    """Documents joined end to end and cut into rows of S+1 tokens.

    Neighbouring rows share one token (the last of a row opens the next), so that every token
    but the very first is predicted exactly once.
    """

    seq_len: int
    tokens: list[int] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)

    def add(self, encoded: Encoded) -> None:
        """Append a document."""
        self.tokens += encoded[0]
        self.counted += encoded[1]

    @property
    def rows(self) -> int:
        """Return the number of whole rows at hand."""
        return max(0, (len(self.tokens) - 1) // self.seq_len)

    def take(self, rows: int) -> tuple[Array, Array]:
        """Remove and return tokens (rows, S+1) int64 and loss mask (rows, S) bool."""
        used = rows * self.seq_len
        at = np.arange(rows)[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        tokens = np.asarray(self.tokens[: used + 1], np.int64)[at]
        counted = np.asarray(self.counted[: used + 1], bool)[at[:, 1:]]
        del self.tokens[:used], self.counted[:used]
        return tokens, counted


@dataclass
class Tally:
    """What was read of a domain so far."""

    documents: int = 0
    tokens: int = 0
    content: Any = field(default_factory=xxhash.xxh3_128)

    def add(self, data: bytes, tokens: int) -> None:
        """Count a document; the length before the bytes keeps two documents from reading as one."""
        self.documents += 1
        self.tokens += tokens
        self.content.update(len(data).to_bytes(8, "little") + data)


@dataclass(frozen=True)
class Span:
    """A run of a source's documents."""

    skip: int = 0
    """Documents before it."""
    stop: int | None = None
    """Number of the document that it ends before; None is the end of the source."""
    content: str = ""
    """Hash that the skipped documents have to have."""
    tokens: int = 0
    """Tokens of the skipped documents."""


def token_rows(
    source: Source,
    tokenizer: Any,
    *,
    seq_len: int,
    holdout: float,
    block: int,
    tally: Tally,
    span: Span = Span(),
) -> Iterator[tuple[str, Array, Array]]:
    """Yield (split, tokens (n, S+1), loss mask (n, S)): n = `block`, less in a split's last.

    `tally` is brought up to date as documents are read.

    Raises:
        InputError: as `documents` and `encode`, or the domain is too short for one training row.
        MismatchError: the documents before the span are others than it says.
    """
    packers = {split: Packer(seq_len) for split in SPLITS}
    taken = dict.fromkeys(SPLITS, 0)
    for split, encoded in _encoded(source, tokenizer, holdout, tally, span):
        packers[split].add(encoded)
        while packers[split].rows >= block:
            taken[split] += block
            yield split, *packers[split].take(block)
    for split, packer in packers.items():
        if rows := packer.rows:
            taken[split] += rows
            yield split, *packer.take(rows)
    if not taken["train"] and not span.skip:
        raise InputError(
            f"domain {source.name!r} ({source.place}) is too short: {tally.tokens:,} tokens in "
            f"{tally.documents:,} documents do not fill one training row of {seq_len + 1}."
        )


def _encoded(
    source: Source, tokenizer: Any, holdout: float, tally: Tally, span: Span
) -> Iterator[tuple[str, Encoded]]:
    reading = documents(source)
    for document in itertools.islice(reading, span.skip):
        tally.add(content(document), 0)
    tally.tokens = span.tokens
    if span.skip and tally.content.hexdigest() != span.content:
        raise MismatchError(
            f"domain {source.name!r} ({source.place}): its first {span.skip:,} documents are not "
            "those that the cache was built from. A domain grows at its end only."
        )
    if source.tokens and tally.tokens >= source.tokens:
        return
    if span.stop is not None:
        reading = itertools.islice(reading, span.stop - span.skip)
    for batch in _batches(reading, DOCUMENTS_AT_ONCE):
        try:
            encoded = encode(tokenizer, batch)
        except InputError as error:
            raise InputError(f"domain {source.name!r} ({source.place}): {error}") from error
        for document, tokens in zip(batch, encoded, strict=True):
            data = content(document)
            tally.add(data, len(tokens[0]))
            yield split_of(data, holdout), tokens
            if source.tokens and tally.tokens >= source.tokens:
                return


def _batches(items: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
