"""What decides the bytes of a cache: names, targets, specs; and the public surface."""

from __future__ import annotations

import pytest

from ddk_cache.errors import CorruptCacheError, InputError, MismatchError
from ddk_cache.format.spec import CacheSpec, TargetSpec, check_name
from tests.helpers import make_spec


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "x" * 65, "naïve", "a.b"])
def test_names_that_are_no_path_part_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="not usable"):
        check_name(name)


@pytest.mark.parametrize("text", ["topk", "topk:0", "topk:x", "tokp:3", ""])
def test_targets_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        TargetSpec.parse(text)


@pytest.mark.parametrize(
    "changes",
    [{"seq_len": 0}, {"targets": "topk:301"}, {"holdout": 1.0}, {"shard_rows": 7}, {"extra": 1}],
)
def test_a_spec_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(CorruptCacheError):
        make_spec(**changes)


def test_a_spec_survives_json_and_its_fingerprint_sees_every_field() -> None:
    assert CacheSpec.from_json(make_spec().to_json()) == make_spec()
    prints = {
        make_spec().fingerprint,
        make_spec(seq_len=17).fingerprint,
        make_spec(holdout=0.2).fingerprint,
    }
    prints |= {
        make_spec(teacher={"class": "z"}).fingerprint,
        make_spec(targets="topk:9").fingerprint,
    }
    assert len(prints) == 5


@pytest.mark.parametrize(
    ("vocab", "token", "kept"),
    [(256, 2, 1), (300, 2, 2), (65535, 2, 2), (65536, 4, 2), (2**18, 4, 3)],
)
def test_ids_take_the_bytes_that_the_vocabulary_needs(vocab: int, token: int, kept: int) -> None:
    arrays = make_spec(vocab_size=vocab).arrays
    assert arrays["tokens"].dtype.itemsize == token
    assert arrays["tokens"].fill >= vocab
    assert arrays["target_ids"].inner == (kept, 16, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperatures": [1.0]},
        {"temperatures": [2.0, 2.0]},
        {"temperatures": [4.0, 2.0]},
        {"temperatures": [0.0]},
        {"temperatures": [2.0], "targets": "sampled:8"},
        {"prob_levels": 300},
        {"seed": -1},
        {"compression": "none"},
        {"targets": "sampled:1"},
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(CorruptCacheError):
        make_spec(**changes)


def test_a_temperature_that_was_not_declared_is_refused_with_the_reason_and_the_choices() -> None:
    declared = make_spec(temperatures=[0.5, 2.0])
    assert declared.temperature_place(2.0) == 1
    with pytest.raises(MismatchError, match=r"temperature 3: the mass outside.* at 0\.5, 1, 2;"):
        declared.temperature_place(3.0)
    with pytest.raises(MismatchError, match="drawn at temperature 1 and are biased at any other"):
        make_spec(targets="sampled:8").temperature_place(2.0)
