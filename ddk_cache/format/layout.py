"""Every path and key of a cache, in one place.

    zarr.json                                       the root: what the cache is
    plans/DOMAIN.json                               the rows of a domain, fixed before scoring
    commits/DOMAIN/SPLIT/N.json                     the record of a shard, written last
    domains/DOMAIN/SPLIT/ARRAY/zarr.json            Zarr's document of an array
    domains/DOMAIN/SPLIT/ARRAY/c/N/0…               shard N of an array, by Zarr's key
    tokenizer/                                      the tokenizer's own files
    pairs/                                          a cache of the pairs of responses, if any
    claims/, tmp/                                   leases and scratch, only while a build runs

Names are relative to the root and use slashes. The last two belong to `ddk_cache.storage.base`.
"""

from __future__ import annotations

from ddk_cache.format.plan import ShardKey
from ddk_cache.format.spec import CacheSpec

ROOT = "zarr.json"
PLANS = "plans"
COMMITS = "commits"
TOKENIZER = "tokenizer"
DOMAINS = "domains"
PAIRS = "pairs"


def pairs_of(cache: str) -> str:
    """Return the path or URL of the pairs of a cache."""
    return f"{cache.rstrip('/')}/{PAIRS}"


def plan_name(domain: str) -> str:
    """Return the name of the plan of a domain."""
    return f"{PLANS}/{domain}.json"


def records_name(domain: str, split: str = "") -> str:
    """Return the name of the folder with the records of a domain, or of one split of it."""
    return f"{COMMITS}/{domain}/{split}".rstrip("/")


def record_name(key: ShardKey) -> str:
    """Return the name of the record of a shard."""
    return f"{records_name(key.domain, key.split)}/{key.number}.json"


def tokenizer_name(file: str) -> str:
    """Return the name of a file of the tokenizer."""
    return f"{TOKENIZER}/{file}"


def group_name(domain: str, split: str = "", array: str = "") -> str:
    """Return the name of the Zarr group of a domain or a split, or of an array."""
    return "/".join(filter(None, (DOMAINS, domain, split, array)))


def document_name(group: str) -> str:
    """Return the name of the Zarr document of a group or an array."""
    return f"{group}/{ROOT}"


def is_document(name: str) -> bool:
    """Return whether a name is that of a Zarr document below `domains`."""
    return name.startswith(f"{DOMAINS}/") and name.endswith(f"/{ROOT}") and ".." not in name


def shards_name(domain: str, split: str, array: str) -> str:
    """Return the name of the folder with the shards of an array."""
    return f"{group_name(domain, split, array)}/c"


def object_name(spec: CacheSpec, key: ShardKey, array: str) -> str:
    """Return the name of one shard of one array: Zarr's key of its first row."""
    zeros = "/0" * len(spec.arrays[array].inner)
    return f"{shards_name(key.domain, key.split, array)}/{key.number}{zeros}"
