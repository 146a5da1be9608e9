"""A row as text: what is learned, control tokens, documents; and rows that are not there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from ddk_cache import BuildConfig, build_cache
from ddk_cache.cli import main
from ddk_cache.inspect.show import pieces_of, show
from ddk_cache.read.cache import Cache
from ddk_cache.testing import BUILD, END, byte_tokenizer, random_teacher
from tests.helpers import call

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def words() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of conversations, each of which is a little shorter than a row."""
    folder = tmp_path_factory.mktemp("talk")
    turns = [{"role": "user", "content": "héllo\x1b[2J"}, {"role": "assistant", "content": "中!"}]
    (folder / "corpus").mkdir()
    lines = json.dumps({"messages": turns}) + "\n"
    (folder / "corpus" / "chat.jsonl").write_text(lines * 12)
    config = BuildConfig(**BUILD | {"seq_len": 20, "holdout": 0.0, "packing": "stream"})
    build_cache(folder / "mix.zarr", folder / "corpus", random_teacher(), words(), config)
    return folder / "mix.zarr"


def shown(*words: object, **env: str) -> Result:
    return call(main, "show", *words, **env)


def test_what_is_learned_is_enclosed_where_there_is_no_terminal(talk: Path) -> None:
    result = shown(talk, "--domain", "chat")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"<|user|>héllo\\x1b[2J\n<|assistant|>«中!\n»{END}")
    assert "\x1b" not in result.stdout


def test_a_terminal_shows_it_in_bold(talk: Path) -> None:
    result = shown(talk, "--domain", "chat", FORCE_COLOR="1", TERM="xterm-256color")
    assert "«" not in result.stdout
    assert "\x1b[1;32m中!" in result.stdout
    assert "\x1b[36m<|user|>\x1b[0m" in result.stdout
    assert "\x1b[2J" not in result.stdout


def test_a_machine_gets_every_token(talk: Path) -> None:
    facts = json.loads(shown(talk, "--domain", "chat", "--json", "--row", 1).stdout)
    assert {name: facts[name] for name in ("domain", "split", "row")} == {
        "domain": "chat",
        "split": "train",
        "row": 1,
    }
    assert sum(len(piece["tokens"]) for piece in facts["pieces"]) == 21
    assert all(piece["document"] is None for piece in facts["pieces"])
    text = "".join(piece["text"] for piece in facts["pieces"])
    assert words().decode([t for piece in facts["pieces"] for t in piece["tokens"]]) == text


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_rows_of_a_split_are_those_of_the_library(split: str, cache: Cache) -> None:
    place = len(cache["notes"][split]) - 1
    result = shown(cache.root, "--domain", "notes", "--split", split, "--row", place, "--json")
    pieces = json.loads(result.stdout)["pieces"]
    tokens = [token for piece in pieces for token in piece["tokens"]]
    assert tokens == cache["notes"][split][place].tokens.tolist()
    assert not pieces[0]["learned"]
    assert all(piece["learned"] for piece in pieces[1:])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--domain", "chatt"], "unknown domain 'chatt'. Did you mean 'chat'?"),
        (["--domain", "chat", "--row", 999], "chat/train: there is no row 999; it has"),
        (["--domain", "chat", "--row", -1], "chat/train: there is no row -1; it has"),
        (["--domain", "chat", "--split", "validation"], "there is no row 0; it has 0 rows"),
        (["--domain", "chat", "--split", "test"], "unknown split 'test'"),
        ([], "Missing option '--domain'"),
    ],
)
def test_what_is_not_there_is_refused(options: list[Any], said: str, talk: Path) -> None:
    result = shown(talk, *options)
    assert result.exit_code == 2, result.output
    assert said in re.sub(r"\s+", " ", result.stderr)
    assert "Traceback" not in result.output


def test_documents_and_padding_are_visible_where_the_cache_keeps_them_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = words()
    texts = [f"ab{END}", f"cde{END}", END * 2]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    tokens, documents = np.concatenate(ids), np.repeat([1, 2, 0], [len(part) for part in ids])
    learned = np.isin(np.arange(len(tokens)), [1, 2, 4, 5])
    show(pieces_of(tokens, learned, documents, tokenizer))
    assert capsys.readouterr().out.splitlines() == [
        "--- document 1 ---",
        f"a«b{END}»",
        "--- document 2 ---",
        f"c«de»{END}",
        "--- padding ---",
    ]


def test_characters_of_several_tokens_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = words()
    tokens = np.array(tokenizer("é中")["input_ids"])
    show(pieces_of(tokens, np.arange(len(tokens)) >= 2, None, tokenizer))
    assert capsys.readouterr().out == "é«中»\n"
    show(pieces_of(tokens, np.arange(len(tokens)) >= 3, None, tokenizer))  # inside of 中
    assert capsys.readouterr().out == "é�«»\n"
