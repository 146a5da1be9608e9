"""Weights and domains that a user names: `code=0.5,web=0.3`, `code,web`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ddk_cache import InputError
from ddk_cache.errors import unknown
from ddk_train.weights.gaps import Floats

NUMBER = r"[0-9]+\.?[0-9]*([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?"
"""A number as people write it; `float` alone would also accept 1_0 and the digits of any script."""


def parse_weights(text: str) -> dict[str, float]:
    """Parse `code=0.5,web=0.3`. Raises InputError where a weight is not a number above 0."""
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.rpartition("=")
        weight = float(value) if re.fullmatch(NUMBER, value.strip()) else math.nan
        if not name or name in found or not 0 < weight < math.inf:
            raise InputError(
                f"cannot read the weight {part!r}. Give each domain once, with a number above 0: "
                "--weights code=0.5,web=0.3"
            )
        found[name] = weight
    return found


def parse_domains(text: str) -> list[str]:
    """Parse `code,web`. Raises InputError where a name is given twice."""
    names = [name for name in (part.strip() for part in text.split(",")) if name]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f"--domains: got {', '.join(twice)} twice, expected each domain once.")
    return names


def chosen_domains(known: Sequence[str], domains: str, weights: str) -> list[str]:
    """Return the domains to train on, sorted: those of --domains, of --weights, or all.

    Raises:
        InputError: a name is not one of the `known`, or the two options name different domains.
    """
    named, weighted = parse_domains(domains), list(parse_weights(weights))
    for name in [*named, *weighted]:
        if name not in known:
            raise InputError(unknown("domain", name, known))
    if named and weighted and set(named) != set(weighted):
        raise InputError(
            f"--weights: got {', '.join(sorted(weighted))}, expected a weight for each of "
            f"--domains {', '.join(sorted(named))}."
        )
    return sorted(named or weighted or known)


def given_weights(given: Mapping[str, float], domains: Sequence[str]) -> Floats | None:
    """Return (D) the given weights scaled to a sum of one, or None where none are given.

    Raises:
        InputError: a name is not one of the domains, or a domain has no weight.
    """
    if not given:
        return None
    for name in given:
        if name not in domains:
            raise InputError(unknown("domain", name, domains))
    if missing := [name for name in domains if name not in given]:
        raise InputError(
            f"--weights: got no weight for {', '.join(missing)}, expected one per domain of the "
            "run. A weight may be small."
        )
    weights = np.array([given[name] for name in domains])
    return np.asarray(weights / weights.sum())
