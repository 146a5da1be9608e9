"""The tree of errors: who catches what, exit codes, messages."""

from __future__ import annotations

import pytest

from ddk_cache import errors
from ddk_cache.errors import DDKError, InputError, RowRangeError, UnknownNameError, unknown


def test_every_error_is_one_of_ours_with_its_exit_code() -> None:
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, DDKError)]
    wrong_call = {error.__name__ for error in found if error.exit_code == 2}
    assert wrong_call == {"InputError", "UnknownNameError", "RowRangeError", "MismatchError"}
    assert all(error.__name__ in str(errors.__doc__) for error in found)


@pytest.mark.parametrize(
    ("error", "builtin"), [(UnknownNameError, KeyError), (RowRangeError, IndexError)]
)
def test_a_failed_lookup_is_also_a_builtin_error(
    error: type[InputError], builtin: type[Exception]
) -> None:
    assert issubclass(error, InputError)
    assert issubclass(error, builtin)
    assert str(error("x: 'y' is not there.")) == "x: 'y' is not there."


def test_the_nearest_known_name_is_offered() -> None:
    assert unknown("split", "trian", ["validation", "train"]) == (
        "unknown split 'trian'. Did you mean 'train'? Known: train, validation."
    )
    assert unknown("split", "x", []) == "unknown split 'x'. Known: ."


def test_the_nearest_known_word_is_pointed_out() -> None:
    message = unknown("weighting", "dkd", ["ddk", "uniform"])
    assert message == "unknown weighting 'dkd'. Did you mean 'ddk'? Known: ddk, uniform."
