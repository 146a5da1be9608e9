"""Weights that move with each measurement: a rule with what it remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddk_cache import InputError
from ddk_cache.errors import unknown
from ddk_train.weights.gaps import Floats, Gaps, Settings, settled
from ddk_train.weights.given import given_weights
from ddk_train.weights.rules import ALPHA, RULES, update

REMEMBERED = ("student_loss", "teacher_loss", "sizes", "rows_seen", "fall_error")
"""What is kept of a measurement for later ones."""


class DomainWeights:
    """Sampling weights of domains that follow their measured gaps under a named rule.

    >>> weights = DomainWeights("excess", ["code", "web"], alpha=0.5)
    >>> weights.update(Gaps(student_loss, teacher_loss, sizes))
    array([0.61, 0.39])
    """

    def __init__(
        self,
        rule: str,
        domains: Sequence[str],
        *,
        alpha: float | None = None,
        given: Mapping[str, float] | None = None,
        rho: float = 0.5,
        window: int = 3,
        shrink: bool = False,
        tilt: float = 0.0,
        repetition_guard: bool = False,
    ) -> None:
        """Begin with even weights; `given` are the weights of rule `fixed`, by domain.

        `alpha` is 0.5 if it is not given, for `gain` 0.75. See `Settings` for the others.

        Raises:
            InputError: the rule is unknown, or `given` does not fit the rule or the domains.
        """
        if rule not in RULES:
            raise InputError(unknown("weighting", rule, RULES))
        if (rule == "fixed") != bool(given):
            raise InputError("weights and rule 'fixed' belong together: give both or neither.")
        self.rule, self.domains = rule, list(domains)
        alpha = ALPHA.get(rule, 0.5) if alpha is None else alpha
        shares = given_weights(given or {}, self.domains)
        self.settings = Settings(alpha, shares, rho, window, shrink, tilt, repetition_guard)
        self.log_factor: Floats | None = None
        """(D) log r, the rule's state; None before the first measurement."""
        self.past: list[Gaps] = []
        """The last measurements, as far as a rule may ask for them; see `settled`."""
        self.weights: Floats = np.full(len(self.domains), 1 / len(self.domains))
        """(D) sampling weights in the order of `domains`, with a sum of one."""

    def update(self, gaps: Gaps) -> Floats:
        """Return the (D) weights after a measurement, and keep them as `weights`.

        Raises:
            DDKError: a held-out loss is not finite.
            InputError: the rule needs what the measurement does not have.
        """
        made = update(self.rule, gaps, self.log_factor, self.settings, self.past)
        self.log_factor, self.weights = made
        self.past = settled([*self.past, gaps], self.settings.window)
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values; floats are hexadecimal, so that they are exact."""
        return {
            "domains": self.domains,
            "log_factor": None if self.log_factor is None else exact(self.log_factor),
            "weights": exact(self.weights),
            "past": [
                {name: v if (v := getattr(gaps, name)) is None else exact(v) for name in REMEMBERED}
                for gaps in self.past
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; one of other domains says nothing about these and is left out."""
        if state["domains"] == self.domains:
            factor = state["log_factor"]
            self.log_factor = None if factor is None else floats(factor)
            self.weights = floats(state["weights"])
            self.past = [remembered(gaps) for gaps in state["past"]]


def remembered(values: Mapping[str, Sequence[str] | None]) -> Gaps:
    """Return the measurement of which a state keeps what is `REMEMBERED`."""
    arrays: dict[str, Any] = {n: None if v is None else floats(v) for n, v in values.items()}
    return Gaps(**arrays)


def exact(values: Floats) -> list[str]:
    """Return floats as hexadecimal text, which restores the same bits."""
    return [float(value).hex() for value in values]


def floats(texts: Sequence[str]) -> Floats:
    """Return the floats that `exact` wrote."""
    return np.array([float.fromhex(text) for text in texts])
