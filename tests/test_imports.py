"""Who may import whom: the table of rooms, held by reading the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("ddk_cache", "ddk_train")

# Which files of ours each file may import. The reading surface is what `ddk_cache` exports.
WORDS = ("errors", "schema", "domain")
CACHE = {
    "__init__": {*WORDS, "reader"},
    "errors": set(),
    "schema": {"errors"},
    "domain": {"schema"},
    "process": set(),
    "files": {"process"},
    "claims": {"process", "objects"},
    "chance": set(),
    "fidelity": {"schema"},
    "objects": {"errors", "files", "process", "bucket"},
    "bucket": {"errors", "schema", "objects"},
    "kept": set(),
    "copies": {"errors", "schema", "files", "objects", "bucket"},
    "shards": {"errors", "schema"},
    "audit": {*WORDS, "codec"},
    "console": {"errors"},
    "pretrained": {"errors", "schema"},
    "corpus": {"errors", "schema"},
    "rows": {"errors", "schema", "corpus"},
    "teacher": {"errors", "schema", "pretrained"},
    "targets": {"schema"},
    "codec": {"errors", "schema"},
    "manifest": {*WORDS, "objects"},
    "records": {*WORDS, "objects", "manifest", "audit"},
    "store": {*WORDS, "objects", "manifest", "records", "codec", "shards"},
    "chunks": {*WORDS, "objects", "manifest", "records", "kept", "shards"},
    "reader": {*WORDS, "objects", "manifest", "records", "chunks", "codec", "copies"},
    "plan": {*WORDS, "corpus", "rows", "store"},
    "opening": {"errors", "schema", "files", "objects", "corpus", "manifest", "scoring", "teacher"},
    "build": {
        *WORDS,
        *("opening", "objects", "console", "corpus", "manifest", "records", "codec"),
        *("plan", "store", "teacher", "pretrained", "audit", "claims", "scoring"),
    },
    "scoring": {*WORDS, "console", "targets", "teacher", "codec", "chance", "fidelity"},
    "estimate": {"domain", "schema", "objects", "corpus", "rows", "store", "codec", "plan"},
    "verify": {*WORDS, "objects", "manifest", "records", "reader", "shards", "store"},
    "info": {"schema", "reader", "audit"},
    "cli": {
        *WORDS,
        *("console", "corpus", "build", "teacher", "pretrained", "reader", "verify"),
        *("info", "estimate", "scoring", "objects", "opening"),
    },
}
SURFACE = {"ddk_cache"}
TRAIN = {
    "__init__": {"config", "trainer"},
    "__main__": {"cli"},
    "config": {"weights", *SURFACE, "ddk_cache.errors"},
    "weights": {*SURFACE, "ddk_cache.errors"},
    "losses": {*SURFACE, "ddk_cache.errors"},
    "head": {"losses", *SURFACE},
    "objective": {"head", "ddk_cache.console"},
    "optim": {"config", *SURFACE},
    "adapter": SURFACE,
    "stop": {"ddk_cache.console"},
    "mixture": {*SURFACE, "ddk_cache.chance"},
    "dequantize": {*SURFACE, "ddk_cache.codec"},
    "loader": {"dequantize", "mixture", *SURFACE, "ddk_cache.console"},
    "processes": {"config", *SURFACE, "ddk_cache.errors", "ddk_cache.teacher"},
    "gap": {"mixture", "weights", "processes", *SURFACE, "ddk_cache.chance"},
    "run": {"config", *SURFACE},
    "identity": {*SURFACE, "ddk_cache.console"},
    "student": {"adapter", "identity", *SURFACE, "ddk_cache.pretrained"},
    "checkpoint": {"identity", "mixture", "processes", "student", "ddk_cache.console"},
    "trainer": {
        *("adapter", "checkpoint", "config", "gap", "head", "identity", "loader", "losses"),
        *("mixture", "objective", "optim", "processes", "run", "stop", "student", "weights"),
        *(*SURFACE, "ddk_cache.console"),
    },
    "plot": set(),
    "text": {"plot"},
    "facts": {"run", "text"},
    "comparison": {"facts", "text"},
    "table": {"comparison", "facts", "text"},
    "page": {"comparison", "facts", "plot", "text", *SURFACE},
    "cli": {
        "config",
        "weights",
        "facts",
        "table",
        "page",
        "trainer",
        *SURFACE,
        "ddk_cache.console",
    },
}

# Heavy libraries and the only files that may load them.
HEAVY = {
    "zarr": {"ddk_cache.store"},
    "obstore": {"ddk_cache.bucket"},
    "numcodecs": {"ddk_cache.shards"},
    "torch": {
        *("ddk_cache.teacher", "ddk_cache.targets", "ddk_cache.opening", "ddk_cache.scoring"),
        "ddk_cache.fidelity",
        *("ddk_train.losses", "ddk_train.head", "ddk_train.objective", "ddk_train.optim"),
        *("ddk_train.dequantize", "ddk_train.loader", "ddk_train.gap", "ddk_train.processes"),
        *("ddk_train.student", "ddk_train.checkpoint", "ddk_train.trainer"),
    },
    "transformers": {"ddk_cache.pretrained", "ddk_train.student"},
    "accelerate": {"ddk_train.processes"},
    "peft": {"ddk_train.adapter"},
    "bitsandbytes": {"ddk_train.optim"},
    "datasets": {"ddk_cache.corpus"},
}


def imports(path: Path) -> set[str]:
    """Return every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = str(node.module)
            # `from package import module` names the module too
            found |= {f"{module}.{alias.name}" for alias in node.names} if module in OURS else set()
            found.add(module)
    return found


def rooms(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


@pytest.mark.parametrize("path", rooms("ddk_cache") + rooms("ddk_train"), ids=lambda p: str(p.stem))
def test_a_room_knows_only_the_rooms_below_it(path: Path) -> None:
    package = path.parent.name
    allowed = {"ddk_cache": CACHE, "ddk_train": TRAIN}[package][path.stem]
    names = {name if name.startswith("ddk_cache") else f"{package}.{name}" for name in allowed}
    if package == "ddk_train" and "ddk_cache" in names:
        names.add("ddk_cache.files")
    modules = {f"{p.parent.name}.{p.stem}" for p in rooms("ddk_cache") + rooms("ddk_train")}
    used = {name for name in imports(path) if name in modules}
    assert used <= names, f"{path.name} may not import {sorted(used - names)}"
    for heavy, users in HEAVY.items():
        if any(name.split(".")[0] == heavy for name in imports(path)):
            assert f"{package}.{path.stem}" in users, f"{path.name} may not import {heavy}"


def test_the_table_has_every_room() -> None:
    assert {path.stem for path in rooms("ddk_cache")} == set(CACHE)
    assert {path.stem for path in rooms("ddk_train")} == set(TRAIN)
