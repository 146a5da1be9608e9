"""Options made from a dataclass: names, types, defaults and help are those of the fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ddk_cache.console import field_texts, options_from


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of nothing."""

    place: str
    """Where it is."""
    seq_len: int = 16
    """Positions in a row,
    as counted."""
    rows: int | None = None
    """Rows; by default as many as fit `seq_len`."""
    kind: str = "small"
    """One of `small` and `fast`."""
    temperatures: tuple[float, ...] = ()
    """Repeatable."""
    quick: bool = False
    """Whether to hurry."""
    hidden: int = 1
    """Not an option."""


@click.command()
@options_from(Config, choices={"kind": ["small", "fast"]}, skip={"hidden"})
def command(**settings: Any) -> None:
    click.echo(repr(Config(**settings)))


def call(*words: str) -> str:
    result = CliRunner().invoke(command, words)
    return result.output


def test_the_text_under_a_field_is_its_help() -> None:
    assert field_texts(Config)["seq_len"] == "Positions in a row, as counted."
    shown = " ".join(call("--help").split())
    assert "Positions in a row, as counted. [default: 16]" in shown
    assert "Rows; by default as many as fit --seq-len." in shown
    assert "[small|fast] One of small and fast." in shown
    assert "hidden" not in shown


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ((), {}),
        (("--seq-len", "8", "--rows", "3"), {"seq_len": 8, "rows": 3}),
        (("--temperature", "2", "--temperature", "0.5"), {"temperatures": (2.0, 0.5)}),
        (("--quick", "--kind", "fast"), {"quick": True, "kind": "fast"}),
        (("--quick", "--no-quick"), {"quick": False}),
    ],
)
def test_options_give_the_fields(words: tuple[str, ...], settings: dict[str, Any]) -> None:
    assert call("--place", "here", *words).strip() == repr(Config(place="here", **settings))


def test_wrong_calls_are_usage_errors() -> None:
    assert "Missing option '--place'" in call()
    assert "'x' is not a valid integer" in call("--place", "here", "--seq-len", "x")
    assert "unknown kind 'smal'. Did you mean 'small'?" in call("--place", "a", "--kind", "smal")
