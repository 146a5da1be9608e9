"""Learning rates by hand, and optimizers whose library is missing."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ddk_cache import InputError
from ddk_train import TrainConfig, train
from ddk_train.optim import learning_rate
from tests.helpers import Configure


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    config = TrainConfig(cache="c", run="r", student="s", steps=100, warmup=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


def test_wsd_stays_and_falls_in_a_line() -> None:
    config = TrainConfig(
        cache="c", run="r", student="s", steps=100, warmup=10, lr=1.0, min_lr=0.1,
        schedule="wsd", decay=0.5,
    )  # fmt: skip
    rates = [learning_rate(config, step) for step in range(101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:56], 1.0)
    np.testing.assert_allclose(np.diff(rates[55:]), -0.9 / 45, rtol=1e-9)
    assert rates[100] == pytest.approx(0.1)


def test_8_bits_are_refused_where_the_library_is_missing(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        train(configure(optimizer="adamw_8bit"))


@pytest.mark.filterwarnings("ignore")
def test_8_bit_states_train_about_as_well(configure: Configure) -> None:
    whole = train(configure("whole", steps=24)).metrics()
    small = train(configure("small", steps=24, optimizer="adamw_8bit")).metrics()
    assert small[-1]["ce"] < small[0]["ce"]
    assert small[-1]["ce"] == pytest.approx(whole[-1]["ce"], abs=0.05)
