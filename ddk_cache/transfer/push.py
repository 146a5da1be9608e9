"""Upload a finished cache to the Hugging Face Hub, in pieces, and check what has arrived.

Each piece is a commit of many files. Shards go first; the documents that show them to readers go
last, in one commit: so a reader of the data set sees the cache whole or, while it grows, as it was
before. What the Hub has is known by its hashes (sha256 of large files, git's of small ones), which
are compared with those of the local files before and after: a push that was stopped resumes with
what is missing, at the price of reading the cache once more.
"""

from __future__ import annotations

import hashlib
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ddk_cache.console import Progress
from ddk_cache.errors import CacheError, InputError
from ddk_cache.format.layout import ROOT, object_name, plan_name, record_name, tokenizer_name
from ddk_cache.format.plan import ShardKey
from ddk_cache.inspect.describe import describe
from ddk_cache.read.cache import Cache, open_cache
from ddk_cache.storage.hub import DATASET, HubPlace, ask_hub, hub_api
from ddk_cache.storage.local import LocalStorage
from ddk_cache.transfer.card import card

PIECE_FILES, PIECE_BYTES = 1000, 2 * 2**30
"""Files and bytes of one commit, at most, by the Hub's advice on large uploads."""

THREADS = 8
"""Files hashed at the same time."""

CARD = "README.md"


def push_cache(cache: str | Path, url: str, *, private: bool = False) -> None:
    """Upload a finished cache to hf://datasets/ORG/NAME[@BRANCH]/FOLDER, or resume that.

    Args:
        cache: A directory. Another place is copied to one first.
        url: Where the cache shall be. The data set is created where there is none.
        private: Whether a data set that is created is a private one.

    Raises:
        InputError: the URL is not of this form, the cache is not in a directory, or this token may
            not write.
        UnfinishedCacheError, CorruptCacheError: the cache is not finished, or damaged.
        StorageError: the Hub does not answer.
        CacheError: what has arrived is not what was sent.
    """
    with open_cache(cache) as opened:
        Push(opened, url).run(private)


class Push:
    """One cache on its way to one data set."""

    def __init__(self, cache: Cache, url: str) -> None:
        if not isinstance(cache.storage, LocalStorage):
            raise InputError(
                f"{cache.uri} is not in a directory. Run 'ddk-cache copy' first, and push the copy."
            )
        self.cache, self.root, self.url = cache, cache.root, url
        self.place, self.api = HubPlace.parse(url), hub_api()

    def run(self, private: bool) -> None:
        """Create the data set, send what is missing, compare all hashes, and write the card."""
        keys = self.cache.manifest.shards()
        ask_hub(self.url, partial(self.create, private))
        with Progress("pushing", len(keys), "shards") as progress:
            for piece in self.pieces(keys):
                self.send([name for key in piece for name in self.files_of(key)])
                progress.advance(len(piece))
        self.send(self.documents())
        self.check([*(name for key in keys for name in self.files_of(key)), *self.documents()])
        ask_hub(self.url, self.write_card)

    def create(self, private: bool) -> None:
        """Create the data set and the branch, where they do not exist."""
        repo, branch = self.place.repo, self.place.revision
        self.api.create_repo(repo, repo_type=DATASET, private=private, exist_ok=True)
        if branch != "main":
            self.api.create_branch(repo, branch=branch, repo_type=DATASET, exist_ok=True)

    def pieces(self, keys: Sequence[ShardKey]) -> Iterator[list[ShardKey]]:
        """Yield shards whose files fit into one commit; one shard at least."""
        piece: list[ShardKey] = []
        files = size = 0
        for key in keys:
            objects = self.cache.record(key).objects
            held = sum(entry.bytes for entry in objects.values())
            if piece and (files + len(objects) + 1 > PIECE_FILES or size + held > PIECE_BYTES):
                yield piece
                piece, files, size = [], 0, 0
            piece.append(key)
            files, size = files + len(objects) + 1, size + held
        if piece:
            yield piece

    def files_of(self, key: ShardKey) -> list[str]:
        """Return the names of the files of a shard."""
        arrays = (object_name(self.cache.spec, key, array) for array in self.cache.spec.arrays)
        return [*arrays, record_name(key)]

    def documents(self) -> list[str]:
        """Return the names of all other files of the cache."""
        plans = self.cache.manifest.plans
        names = dict.fromkeys(name for plan in plans.values() for name in plan.metadata)
        files = map(tokenizer_name, self.cache.manifest.root.tokenizer_files)
        return [*names, *files, *map(plan_name, plans), ROOT]

    def send(self, names: Sequence[str]) -> None:
        """Upload, in one commit, those of the files that the Hub does not have."""

        def ask() -> None:
            if missing := self.differing(names):
                self.commit({self.there(name): self.root / name for name in missing})

        ask_hub(self.url, ask)

    def commit(self, files: dict[str, Path]) -> None:
        """Upload files, path in the data set → local file, in one commit."""
        from huggingface_hub import CommitOperationAdd

        self.api.create_commit(
            self.place.repo,
            [CommitOperationAdd(path, str(file)) for path, file in files.items()],
            commit_message=f"{posixpath.basename(self.place.folder)}: {len(files)} files",
            repo_type=DATASET,
            revision=self.place.revision,
        )

    def there(self, name: str) -> str:
        """Return the path of a file in the data set."""
        return posixpath.join(self.place.folder, name)

    def differing(self, names: Sequence[str]) -> list[str]:
        """Return which files the Hub does not have, or not with the bytes of the local ones."""
        found = {
            entry.path: entry
            for first in range(0, len(names), PIECE_FILES)
            for entry in self.entries(list(map(self.there, names[first : first + PIECE_FILES])))
        }

        def same(name: str) -> bool:
            entry = found.get(self.there(name))
            return entry is not None and same_bytes(self.root / name, entry)

        with ThreadPoolExecutor(THREADS) as pool:
            return [n for n, known in zip(names, pool.map(same, names), strict=True) if not known]

    def entries(self, paths: list[str]) -> list[Any]:
        """Return what the Hub says of those files that it has."""
        found: list[Any] = self.api.get_paths_info(
            self.place.repo, paths, revision=self.place.revision, repo_type=DATASET
        )
        return found

    def check(self, names: Sequence[str]) -> None:
        """Compare the hashes of all files. Raises CacheError where one differs."""
        if bad := ask_hub(self.url, partial(self.differing, names)):
            raise CacheError(
                f"{self.url}: {len(bad)} of {len(names)} files are not as they were sent, first "
                f"{bad[0]}. Push again."
            )

    def write_card(self) -> None:
        """Write the card of the data set, unless there is one, which is a person's by now."""
        if self.entries([CARD]):
            return
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / CARD
            made.write_text(card(describe(self.cache), self.url))
            self.commit({CARD: made})


def same_bytes(path: Path, entry: Any) -> bool:
    """Return whether a file has the size and hash of a file on the Hub."""
    size = path.stat().st_size
    if entry.size != size:
        return False
    if entry.lfs:
        with path.open("rb") as file:
            return bool(hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256)
    blob = hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False)
    return bool(blob.hexdigest() == entry.blob_id)
