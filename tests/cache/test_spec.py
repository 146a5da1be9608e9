"""What decides the bytes of a cache: names, targets, specs; and the public surface."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert arrays["target_ids"].inner == (kept, 16 * 8)


@pytest.mark.parametrize(
    ("text", "mass"),
    [
        ("sampled:8", 0.9995),
        ("topk:8", 0.9995),
        ("topk:8:1", 1.0),
        ("topk:8:1.0", 1.0),
        ("topk:8:.25", 0.25),
        ("topk:8:0.99999999", 0.99999999),
        ("topk:8:1e-05", 1e-5),
    ],
)
def test_targets_are_read_as_they_are_written(text: str, mass: float) -> None:
    found = TargetSpec.parse(text)
    assert (found.size, found.kept_mass) == (8, mass)
    assert TargetSpec.parse(str(found)) == found


@given(st.floats(0, 1, exclude_min=True))
def test_any_mass_is_read_as_it_is_written(mass: float) -> None:
    spec = TargetSpec("topk", 3, mass)
    assert TargetSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text", ["sampled:8:0.9", "topk:8:", "topk:8:0", "topk:8:1.1", "topk:8:nan", "topk:8:-1"]
)
def test_a_mass_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="only topk takes a mass, above 0 and at most 1"):
        TargetSpec.parse(text)


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
