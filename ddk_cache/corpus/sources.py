"""Where the documents of each domain are, and reading them in a stable order.

Every source is read through `datasets` as a stream: nothing is copied, the first document is
there at once, and a source larger than the disk works. The price is that a domain is read from
its start each time it is planned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ddk_cache.errors import InputError, unknown
from ddk_cache.format.spec import check_name

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
