"""Every path and key of a cache, in one place.

    zarr.json                                       the root: what the cache is
    plans/DOMAIN.json                               the rows of a domain, fixed before scoring
    commits/DOMAIN/SPLIT/N.json                     the record of a shard, written last
    domains/DOMAIN/SPLIT/ARRAY/zarr.json            Zarr's document of an array
    domains/DOMAIN/SPLIT/ARRAY/c/N/0…               shard N of an array, by Zarr's key
    tokenizer/                                      the tokenizer's own files
    claims/, tmp/                                   only while a build is running

Names are relative to the root and use slashes.
"""

from __future__ import annotations

from ddk_cache.format.plan import ShardKey
from ddk_cache.format.spec import CacheSpec

ROOT = "zarr.json"
PLANS = "plans"
COMMITS = "commits"
TOKENIZER = "tokenizer"
DOMAINS = "domains"


def plan_name(domain: str) -> str:
    """Return the name of the plan of a domain, below the root."""
    return f"{PLANS}/{domain}.json"


def record_name(key: ShardKey) -> str:
    """Return the name of the record of a shard, below the root."""
    return f"{COMMITS}/{key.domain}/{key.split}/{key.number}.json"


def object_name(spec: CacheSpec, key: ShardKey, array: str) -> str:
    """Return the name of one shard of one array, below the root: Zarr's key of its first row."""
    zeros = "/0" * len(spec.arrays[array].inner)
    return f"domains/{key.domain}/{key.split}/{array}/c/{key.number}{zeros}"


def split_name(domain: str, split: str) -> str:
    """Return the name of the Zarr group of a split."""
    return f"{DOMAINS}/{domain}/{split}"
