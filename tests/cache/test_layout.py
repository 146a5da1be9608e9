"""The names of a cache: those on disk, and written in no other module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ddk_cache import Cache
from ddk_cache.format import layout
from ddk_cache.format.plan import ShardKey
from tests.helpers import tree

PACKAGE = Path(layout.__file__).parents[1]


def test_the_names_are_those_on_disk(cache: Cache) -> None:
    files = cache.manifest.root.tokenizer_files
    names = {layout.ROOT, *map(layout.plan_name, cache), *map(layout.tokenizer_name, files)}
    names |= {layout.document_name(layout.group_name(domain)) for domain in cache}
    names.add(layout.document_name(layout.DOMAINS))
    for domain, splits in cache.items():
        for split in splits:
            names.add(layout.document_name(layout.group_name(domain, split)))
            for array in cache.spec.arrays:
                names.add(layout.document_name(layout.group_name(domain, split, array)))
                for number in range(cache.shard_count(domain, split)):
                    key = ShardKey(domain, split, number)
                    names.add(layout.object_name(cache.spec, key, array))
                    names.add(layout.record_name(key))
    assert names == set(tree(cache.root))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("domains/zarr.json", True),
        ("domains/code/train/tokens/zarr.json", True),
        ("zarr.json", False),
        ("domains/code/x.json", False),
        ("domains/../x/zarr.json", False),
        ("../domains/zarr.json", False),
    ],
)
def test_documents_are_below_the_domains(name: str, expected: bool) -> None:
    assert layout.is_document(name) is expected


def test_no_other_module_spells_a_path() -> None:
    spelled = re.compile(r"""["'](domains|commits|plans|tokenizer)/|/zarr\.json""")
    found = [
        f"{path.name}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "layout.py"
        for line in path.read_text().splitlines()
        if spelled.search(line)
    ]
    assert not found
