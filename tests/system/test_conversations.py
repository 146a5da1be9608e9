"""Caches of conversations, and of prompts with responses: what is learned, growth and mending."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_cache import BuildConfig, MismatchError, build_cache, find_sources, open_cache
from ddk_cache.build.estimate import estimate_cache
from ddk_cache.inspect.verify import drop_bad, verify
from ddk_cache.read.cache import Cache
from ddk_cache.testing import BUILD, END, byte_tokenizer, random_teacher
from tests.helpers import quiet, tree

TEMPLATE = Path(__file__).parents[1] / "data" / "templates" / "qwen3.jinja"

SETTINGS: dict[str, Any] = BUILD | {"seq_len": 64, "holdout": 0.0, "packing": "stream"}


@pytest.fixture(scope="module")
def words() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE.read_text()
    return tokenizer


def talk(number: int) -> dict[str, Any]:
    """Return a conversation of two turns, the answers of both with reasoning."""
    messages = []
    for part in (f"{number}a", f"{number}b"):
        messages.append({"role": "user", "content": f"question {part}"})
        said = {"role": "assistant", "content": f"answer {part}"}
        messages.append(said | {"reasoning_content": f"thought {part}"})
    return {"messages": messages, "tools": None}


def pair(number: int) -> dict[str, Any]:
    return {"question": f"ask {number}", "answer": f"reply {number}"}


def write(folder: Path, first: int, end: int) -> Path:
    """Append to a corpus of two domains, one of conversations and one of pairs."""
    folder.mkdir(exist_ok=True)
    for name, record in {"chat": talk, "pairs": pair}.items():
        with (folder / f"{name}.jsonl").open("a") as file:
            file.writelines(json.dumps(record(number)) + "\n" for number in range(first, end))
    return folder


def build(path: Path, corpus: Path, words: Any, learn: str, **options: Any) -> Cache:
    config = BuildConfig(**SETTINGS, learn=learn)
    build_cache(path, corpus, random_teacher(), words, config, **options)
    return open_cache(path)


def learned(cache: Cache, domain: str, words: Any) -> str:
    """Return what is learned of the training rows, which are one stream."""
    rows = cache[domain].train[:]
    labels, mask = rows.tokens[:, 1:].ravel(), rows.loss_mask.ravel()
    return str(words.decode(labels[mask]))


EXPECTED = {
    "assistant": "<think>\nthought {0}a\n</think>\n\nanswer {0}a<|im_end|>"
    "<think>\nthought {0}b\n</think>\n\nanswer {0}b<|im_end|>",
    "last": "<think>\nthought {0}b\n</think>\n\nanswer {0}b<|im_end|>",
    "all": "<|im_start|>user\nquestion {0}a<|im_end|>\n<|im_start|>assistant\nanswer {0}a<|im_end|>"
    "\n<|im_start|>user\nquestion {0}b<|im_end|>\n<|im_start|>assistant\n"
    f"<think>\nthought {{0}}b\n</think>\n\nanswer {{0}}b<|im_end|>\n{END}",
}


@pytest.mark.parametrize("learn", EXPECTED)
def test_a_cache_holds_what_is_to_be_learned(learn: str, words: Any, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", 10, 30)
    cache = build(tmp_path / "mix.zarr", corpus, words, learn)
    said = learned(cache, "chat", words)
    whole = "".join(EXPECTED[learn].format(number) for number in range(10, 30))
    assert len(said) > len(whole) - 100  # the last row is not full
    assert whole.removeprefix("<|im_start|>").startswith(said)  # the first token is no label
    replies = learned(cache, "pairs", words)
    thought = "<think>\n\n</think>\n\n"
    assert f"{thought}reply 12<|im_end|>" in replies
    assert ("ask" in replies) == (learn == "all")


def test_a_cache_of_conversations_grows_and_is_mended(words: Any, tmp_path: Path) -> None:
    path, corpus = tmp_path / "mix.zarr", write(tmp_path / "corpus", 10, 30)
    build(path, corpus, words, "last")
    write(corpus, 30, 60)
    with pytest.raises(MismatchError, match="learn: the cache has last, this build asks for assi"):
        build(path, corpus, words, "assistant", grow=True)
    grown = build(path, corpus, words, "last", grow=True)
    assert [portion.documents for portion in grown.plan("chat").portions] == [20, 50]
    said = learned(grown, "chat", words)
    assert "answer 58b" in said
    assert "answer 11a" not in said
    before = tree(path)
    for name in ("chat/train/tokens/c/0/0", "pairs/train/loss_mask/c/1/0"):
        (path / "domains" / name).unlink()
    opened = open_cache(path)
    drop_bad(opened, verify(opened, quiet))
    mended = build(path, corpus, words, "last", grow=True)
    assert tree(path) == before
    assert not verify(mended, quiet)


def test_the_limit_of_tokens_may_cut_a_conversation(words: Any, tmp_path: Path) -> None:
    write(tmp_path / "corpus", 10, 30)
    (tmp_path / "mix.yaml").write_text("domains: {chat: {path: corpus/chat.jsonl, tokens: 1000}}")
    config = BuildConfig(**SETTINGS)
    build_cache(tmp_path / "a.zarr", tmp_path / "mix.yaml", random_teacher(), words, config)
    with open_cache(tmp_path / "a.zarr") as cache:
        plan = cache.plan("chat")
        assert plan.tokens == 1000
        assert cache["chat"].train[:].tokens.shape == (999 // 64, 65)
        stream = np.concatenate([row.tokens[1:] for row in cache["chat"].train])
        assert words.decode(stream).count(END) in (2 * plan.documents - 1, 2 * plan.documents - 2)


def test_an_estimate_says_what_was_found(words: Any, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", 10, 30)
    (corpus / "notes.txt").write_text("some notes\n\n" * 40)
    facts = estimate_cache("x.zarr", find_sources(corpus), words, config=BuildConfig(**SETTINGS))
    assert {name: domain["holds"] for name, domain in facts["domains"].items()} == {
        "chat": "conversations (messages)",
        "notes": "text (text)",
        "pairs": "prompts and responses (question, answer)",
    }
