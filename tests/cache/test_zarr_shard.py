"""A Zarr shard as bytes: read as zarr-python wrote it, and refused when damaged."""

from __future__ import annotations

import struct

import google_crc32c
import numpy as np
import pytest

from ddk_cache import Cache, CorruptCacheError
from ddk_cache.format.layout import object_name
from ddk_cache.format.plan import ShardKey
from ddk_cache.format.zarr_shard import Index, bodies, check_size, checksums, decode, index_of

KEY = ShardKey("letters", "train", 0)


@pytest.fixture
def shard(cache: Cache) -> bytes:
    data: bytes = (cache.root / object_name(cache.spec, KEY, "tokens")).read_bytes()
    return data


def sealed(index: list[int]) -> bytes:
    """Return the index of a shard with a right checksum."""
    data = struct.pack(f"<{len(index)}Q", *index)
    return data + struct.pack("<I", google_crc32c.value(data))


def test_a_shard_is_decoded_as_zarr_reads_it(cache: Cache, shard: bytes) -> None:
    spec = cache.spec
    out = np.empty((spec.shard_rows, spec.seq_len + 1), "<u2")
    decode(shard, "here", spec.chunks_per_shard, out)
    np.testing.assert_array_equal(out, cache.read("letters", "train", range(8)).tokens)


def test_the_checksums_are_those_of_the_record(cache: Cache, shard: bytes) -> None:
    committed = cache.record(KEY).objects["tokens"].chunks
    assert checksums(shard, "here", cache.spec.chunks_per_shard) == committed


def test_every_flipped_bit_of_a_shard_is_noticed(cache: Cache, shard: bytes) -> None:
    for place in range(0, 8 * len(shard), 7):
        flipped = bytearray(shard)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(CorruptCacheError, match="here"):
            list(bodies(bytes(flipped), "here", cache.spec.chunks_per_shard))


@pytest.mark.parametrize(
    "index", [[0, 90], [90, 10], [2**64 - 1, 2**64 - 1], [0, 3], [2**63, 2**63]]
)
def test_an_index_that_points_outside_is_refused(index: list[int]) -> None:
    footer = sealed(index)
    with pytest.raises(CorruptCacheError, match="here lacks a chunk or points outside"):
        Index.parse("here", 80 + len(footer), footer)


@pytest.mark.parametrize("size", [0, 3, 19])
def test_a_shard_that_is_too_short_is_refused(size: int) -> None:
    with pytest.raises(CorruptCacheError, match="here is cut short"):
        index_of(b"x" * size, "here", 1)


def test_a_chunk_that_claims_another_size_is_refused() -> None:
    body = struct.pack("<4xIII", 2**31, 1, 16)
    with pytest.raises(CorruptCacheError, match=r"here is damaged: it claims 2,147,483,648 bytes"):
        check_size(body, "here", 64)
    with pytest.raises(CorruptCacheError, match="it has 2 bytes"):
        check_size(b"xx", "here", 64)
