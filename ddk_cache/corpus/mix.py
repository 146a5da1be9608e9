"""Mix files: a YAML mapping from the names of domains to where their documents are.

    domains:
      code: {path: data/code, tokens: 40_000_000}
      web:  {dataset: org/name, config: en, split: train, column: content}
      math: {path: data/math, teacher: math-model}

Everything is checked before anything is read, and nothing is guessed: a name that YAML takes for
a number or a boolean is refused rather than spelled out again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ddk_cache.errors import InputError, unknown

SETTINGS = {
    "path": {"column", "tokens", "teacher"},
    "dataset": {"config", "split", "column", "tokens", "teacher"},
}
"""Where documents are → the settings that go with it."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One domain of a mix file: either `path` or `dataset` is given."""

    name: str
    path: Path | None = None
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    column: str | None = None
    tokens: int | None = None
    teacher: str | None = None
    """Directory, hub id or address of the domain's own teacher."""


class _Loader(yaml.SafeLoader):
    """YAML whose mappings may not name a key twice (plain YAML keeps the last, silently)."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [str(key.value) for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise InputError(f"two domains or settings of one name: {', '.join(twice)}.")
        return node


def read_mix(path: Path) -> list[Entry]:
    """Return the domains of a mix file. Raises InputError where it is malformed."""
    try:
        mix = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is not readable YAML: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path} is not readable YAML: it is nested too deeply.") from error
    domains = mix.get("domains") if isinstance(mix, dict) else None
    if not isinstance(domains, dict):
        raise InputError(f"{path} needs a mapping 'domains:' from names to settings.")
    return [_entry(path, name, settings) for name, settings in domains.items()]


def _entry(mix: Path, name: object, settings: object) -> Entry:
    where = f"{mix}: domain {name!r}"
    if not isinstance(name, str):
        raise InputError(f"{where}: got {type(name).__name__}, expected text. Put it in quotes.")
    if not isinstance(settings, dict) or ("path" in settings) == ("dataset" in settings):
        raise InputError(f"{where}: give either 'path:' or 'dataset:'.")
    kind = "path" if "path" in settings else "dataset"
    for key, value in settings.items():
        _check_setting(where, kind, str(key), value)
    given = {key: value for key, value in settings.items() if value is not None}
    if kind == "path":
        given["path"] = _path(where, mix.parent, settings["path"])
    else:
        _check_dataset(where, settings["dataset"])
    if "teacher" in given and (mix.parent / given["teacher"]).is_dir():
        given["teacher"] = str(mix.parent / given["teacher"])
    return Entry(name=name, **given)


def _check_setting(where: str, kind: str, key: str, value: object) -> None:
    """Raise InputError where a setting is unknown, does not go with its kind, or has no value."""
    if kind == "path" and key in SETTINGS["dataset"] - SETTINGS["path"]:
        raise InputError(f"{where}: {key!r} goes with 'dataset:', not with 'path:'.")
    if key != kind and key not in SETTINGS[kind]:
        raise InputError(f"{where}: {unknown('setting', key, {kind, *SETTINGS[kind]})}")
    if value is None and key != kind:
        return
    if key == "tokens":
        if type(value) is not int or value < 1:  # a bool is an int too
            raise InputError(f"{where}: 'tokens': got {value!r}, expected a whole number above 0.")
    elif not isinstance(value, str):
        raise InputError(f"{where}: {key!r}: got {value!r}, expected text. Put it in quotes.")


def _path(where: str, folder: Path, path: str) -> Path:
    """Return a path of a mix file, which is relative to the file. Raises InputError on a URL."""
    if "://" in path:
        raise InputError(
            f"{where}: {path!r} is a URL, which is not supported. Download it, or name a data set "
            "on the hub with 'dataset:'."
        )
    try:
        return folder / Path(path).expanduser()
    except RuntimeError as error:  # a home that nobody has
        raise InputError(f"{where}: {path!r}: {error}") from error


def _check_dataset(where: str, name: str) -> None:
    """Raise InputError unless a name can only mean a data set on the hub.

    `datasets` takes "text" or "json" for a reader of the files of the current directory, and a
    folder of that name for the data set.
    """
    if not HUB_NAME.fullmatch(name) or name.startswith("."):
        raise InputError(
            f"{where}: dataset {name!r}: expected 'owner/name', as on the hub. Local files go with "
            "'path:'."
        )
    if Path(name).exists():
        raise InputError(f"{where}: dataset {name!r} is a folder here. Use 'path:' to read it.")
