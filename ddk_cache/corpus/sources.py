"""Where the documents of each domain are, and reading them in a stable order.

A corpus is a directory, in which every file or sub-folder is a domain, or a mix file that names
them. Every source is read as a stream: nothing is copied, the first document is there at once, and
a source larger than the disk works. The price is that a domain is read from its start each time it
is planned.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddk_cache.atomic import PARTIAL
from ddk_cache.corpus.document import LAYOUTS, Document, describe, document_of, layouts_of
from ddk_cache.corpus.files import COMPRESSED, KINDS, Fields, Layout, kind_of, read, select
from ddk_cache.corpus.mix import Entry, read_mix
from ddk_cache.errors import InputError
from ddk_cache.format.layout import ROOT
from ddk_cache.format.spec import check_name

OWN = ""
"""Name of the teacher of a domain that names none: the cache's own."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the documents of one domain come from."""

    name: str
    loader: str
    """How local files are read, or the name of a data set on the hub."""
    path: str | None = None
    """The local file or folder; None for the hub."""
    files: tuple[str, ...] = ()
    """The data files at `path`, in order."""
    config: str | None = None
    split: str = "train"
    column: str | None = None
    """The column that holds the documents; by default they are looked for, see `layouts_of`."""
    tokens: int | None = None
    """Stop at this many tokens; the document that reaches them is cut."""
    teacher: str = OWN
    """Directory, hub id or address of a teacher, if the domain has one of its own."""

    @property
    def place(self) -> str:
        """Return what to call the source in a message."""
        return self.path or f"data set {self.loader!r}"

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
        } | ({"teacher_name": Path(self.teacher).name} if self.teacher else {})


# --- finding the domains --------------------------------------------------------------------------


def find_sources(corpus: str | Path) -> list[Source]:
    """Return the domains of a corpus directory or of a YAML mix file, sorted by name.

    Hidden files and folders, Zarr stores (a cache inside its own corpus) and files of other kinds
    are not data; what is left out by name is logged, and so is a file that two domains share.

    Raises:
        InputError: the corpus does not exist, names no domain, or two of one name.
    """
    path = Path(corpus)
    if path.suffix.lower() in {".yaml", ".yml"} and path.is_file():
        sources = [_from_entry(entry) for entry in read_mix(path)]
    elif path.is_dir():
        sources = _from_directory(path)
    else:
        raise InputError(f"no corpus at {path}: neither a directory nor a .yaml mix file.")
    if not sources:
        raise InputError(f"{path} holds no domain. Each file or sub-folder of data is one.")
    sources.sort(key=lambda source: source.name)
    _check_names(sources)
    _warn_of_shared_files(sources)
    return sources


def _check_names(sources: Sequence[Source]) -> None:
    """Raise InputError where two names are the same on a file system that ignores case."""
    seen: dict[str, Source] = {}
    for source in sources:
        other = seen.setdefault(source.name.lower(), source)
        if other is source:
            continue
        names = repr(source.name)
        if source.name != other.name:
            names = f"{other.name!r} and {source.name!r}, which differ only in case"
        raise InputError(
            f"two domains are named {names}: {other.place} and {source.place}. Rename one."
        )


def _warn_of_shared_files(sources: Sequence[Source]) -> None:
    domains = defaultdict(list)
    for source in sources:
        for file in source.files:
            domains[Path(file).resolve()].append(source.name)
    for path, names in domains.items():
        if len(names) > 1:
            log.warning("%s is read by several domains: %s", path, ", ".join(names))


def _from_directory(path: Path) -> list[Source]:
    if (path / ROOT).exists():
        raise InputError(f"{path} is a Zarr store, not a corpus: it holds {ROOT}.")
    sources = []
    for entry in sorted(path.iterdir()):
        if _is_hidden(entry):
            continue
        if entry.is_dir() and (entry / ROOT).exists():
            log.info("%s is left out: it is a Zarr store", entry.name)
        elif entry.is_dir() or kind_of(entry):
            sources.append(_local(_name_of(entry), entry))
        else:
            log.info("%s is left out: not a %s file", entry.name, ", ".join(KINDS))
    return sources


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.endswith(PARTIAL)


def _name_of(path: Path) -> str:
    """Return the name of the domain at a path. Raises InputError where it is not usable."""
    try:
        return check_name(path.name.partition(".")[0])
    except InputError as error:
        raise InputError(
            f"{error} A mix file can name it otherwise: "
            f"domains: {{NAME: {{path: {str(path.absolute())!r}}}}}."
        ) from error


def _local(name: str, path: Path, column: str | None = None, tokens: int | None = None) -> Source:
    """Return the source of a file, or of all data files below a folder."""
    if not path.exists():
        raise InputError(f"domain {name!r}: there is no {path}.")
    files = list(_data_files(path)) if path.is_dir() else [path]
    kinds = {kind_of(file) for file in files}
    if len(kinds) != 1 or None in kinds:
        held = ", ".join(sorted({file.suffix for file in files})) or "no data file"
        raise InputError(
            f"domain {name!r}: {path}: got {held}, expected files of one kind out of "
            f"{', '.join(KINDS)}, each of them plain or compressed ({', '.join(COMPRESSED)})."
        )
    return Source(
        name=name,
        loader=str(kinds.pop()),
        path=str(path),
        files=tuple(map(str, files)),
        column=column,
        tokens=tokens,
    )


def _data_files(folder: Path) -> Iterator[Path]:
    """Yield the data files below a folder, sorted by their parts."""
    for entry in sorted(folder.iterdir()):
        if _is_hidden(entry):
            continue
        if entry.is_dir():
            if entry.is_symlink():  # it may lead back up
                log.warning("%s is left out: a link to a folder inside a domain", entry)
            elif (entry / ROOT).exists():
                log.info("%s is left out: it is a Zarr store", entry)
            else:
                yield from _data_files(entry)
        elif entry.is_file() and kind_of(entry):
            yield entry


def _from_entry(entry: Entry) -> Source:
    check_name(entry.name)
    teacher = entry.teacher or OWN
    if entry.path:
        source = _local(entry.name, entry.path, entry.column, entry.tokens)
        return dataclasses.replace(source, teacher=teacher)
    return Source(
        name=entry.name,
        loader=str(entry.dataset),
        config=entry.config,
        split=entry.split or "train",
        column=entry.column,
        tokens=entry.tokens,
        teacher=teacher,
    )


# --- reading documents ----------------------------------------------------------------------------


def documents(source: Source) -> Iterator[Document]:
    """Yield the documents of a source in order; empty and blank ones are left out.

    A folder of text files gives a document per file. A text file that is a domain by itself gives
    one per paragraph (blocks between blank lines), since one document cannot be in two splits.

    Raises:
        InputError: the source cannot be read, has no such column, or holds no document.
    """
    found = False
    try:
        for fields in read_fields(source):
            document = document_of(fields)
            if document:
                if not found and not isinstance(document, str):
                    log.info("domain %r holds %s", source.name, describe(fields))
                found = True
                yield document
    except InputError as error:
        raise InputError(f"domain {source.name!r}: {error}") from error
    if not found:
        raise InputError(f"domain {source.name!r}: {source.place} holds no document.")


def held_by(source: Source) -> str:
    """Return what the first document of a source is, and in which columns it was found.

    Raises:
        InputError: the source cannot be read up to there.
    """
    described = (describe(fields) for fields in read_fields(source) if document_of(fields))
    return next(described, "no document")


def read_fields(source: Source, layouts: Sequence[Layout] = LAYOUTS) -> Iterator[Fields]:
    """Yield what a source holds in its own column, or in the first of the layouts that it has.

    Raises:
        InputError: the source cannot be read, or has none of the layouts.
    """
    wanted = layouts_of(source.column) if source.column else layouts
    if source.path is None:
        yield from select(_hub_records(source), wanted)
    paragraphs = source.loader == "text" and source.files == (source.path,)
    for file in source.files:
        yield from read(Path(file), "paragraphs" if paragraphs else source.loader, wanted)


def _hub_records(source: Source) -> Iterator[tuple[str, Any]]:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        stream = datasets.load_dataset(
            source.loader, name=source.config, split=source.split, streaming=True
        )
        for number, record in enumerate(stream, 1):
            yield f"{source.place}: record {number}", record
    except Exception as error:  # each builder has errors of its own
        raise InputError(f"{source.place} cannot be read: {error}") from error
