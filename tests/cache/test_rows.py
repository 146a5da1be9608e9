"""Documents → rows: splits, packing, limits, and domains that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_cache.corpus import rows as rows_module
from ddk_cache.corpus.document import Conversation
from ddk_cache.corpus.rows import Tally, encode, token_rows
from ddk_cache.corpus.sources import find_sources
from ddk_cache.errors import InputError
from ddk_cache.testing import END, byte_tokenizer
from tests.helpers import jsonl, make_spec

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def read(path: Path, tokenizer: Any, **settings: Any) -> dict[Any, Any]:
    """Return the rows of every domain and split of a corpus, and the tallies."""
    spec = make_spec(**{"seq_len": 8, "holdout": 0.5} | settings)
    out: dict[Any, Any] = {}
    for source in find_sources(path):
        tally = out[source.name] = Tally()
        for split, arrays in token_rows(source, tokenizer, spec, block=4, tally=tally):
            rows = zip(*arrays.values(), strict=True)
            out.setdefault((source.name, split), []).extend(rows)
    return out


def write(path: Path, key: str, values: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(jsonl({key: value} for value in values))


def test_no_document_is_in_both_splits_and_appending_moves_nothing(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "corpus" / "a.jsonl"
    texts = [f"document number {n}" for n in range(60)]

    def write_and_read(some: list[str]) -> dict[Any, Any]:
        write(path, "text", some)
        return read(path.parent, tokenizer)

    before = write_and_read(texts + texts[:20])
    after = write_and_read(texts + texts[:20] + ["more " * 9] * 5)
    words = {}
    for split in ("train", "validation"):
        old, new = before["a", split], after["a", split]
        for (row, mask), (row_after, mask_after) in zip(old, new[: len(old)], strict=True):
            assert (row == row_after).all()
            assert (mask == mask_after).all()
        stream = np.concatenate([old[0][0][:1], *(row[1:] for row, _ in old)])
        words[split] = set(tokenizer.decode(stream).split("<|endoftext|>")[:-1])
    assert words["train"]
    assert words["validation"]
    assert not words["train"] & words["validation"]


def test_a_document_is_closed_by_an_end_of_text_that_counts_only_in_plain_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    [plain], [chat] = encode(tokenizer, ["one", Conversation(talk)])
    assert tokenizer.decode(plain[0]) == f"one{END}"
    assert plain[1] == [True] * 4
    assert tokenizer.decode(chat[0]) == f"[user]hi;[assistant]ho;{END}"
    assert not chat[1][-1]


def test_a_control_token_in_a_document_is_text(tokenizer: Any) -> None:
    (((ids, _),),) = encode(tokenizer, [f"before{END}after"])
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == f"before{END}after{END}"


def test_the_document_that_reaches_the_limit_is_cut(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "data.jsonl", "body", [f"document {n:04}" for n in range(100)])
    mix = tmp_path / "mix.yaml"
    for limit, documents in {140: 10, 141: 11, 153: 11, 154: 11, 155: 12, 10_000: 100}.items():
        mix.write_text(f"domains: {{some: {{path: data.jsonl, column: body, tokens: {limit}}}}}")
        tally = read(mix, tokenizer, seq_len=4)["some"]
        assert tally.documents == documents  # of 13 letters and an end-of-text each
        assert tally.tokens == min(limit, 1400)


def test_batches_are_bounded_by_bytes_and_change_no_row(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "c" / "a.jsonl", "text", [f"{n} " * (n % 50 + 1) for n in range(300)])
    whole = read(tmp_path / "c", tokenizer)
    sizes: list[int] = []

    def counting(tokenizer: Any, batch: Any, first: int, learn: str) -> Any:
        sizes.append(sum(map(len, batch)))
        return encode(tokenizer, batch, first, learn)

    monkeypatch.setattr(rows_module, "BATCH_BYTES", 500)
    monkeypatch.setattr(rows_module, "encode", counting)
    small = read(tmp_path / "c", tokenizer)
    assert max(sizes) < 500 + 200
    for split in ("train", "validation"):
        np.testing.assert_array_equal(
            [row for row, _ in whole["a", split]], [row for row, _ in small["a", split]]
        )


def test_a_domain_too_short_for_a_row_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "c" / "a.jsonl", "text", ["x"])
    with pytest.raises(InputError, match="too short: 2 tokens in 1 documents"):
        read(tmp_path / "c", tokenizer)


def test_a_domain_without_assistant_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    write(
        tmp_path / "a.jsonl", "messages", [[{"role": "user", "content": f"{n}"}] for n in range(20)]
    )
    with pytest.raises(InputError, match=r"domain 'a' .* has no assistant tokens in its \d+ train"):
        read(tmp_path, tokenizer)


def test_a_bad_conversation_is_refused_by_its_number(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    talks = [[{"role": "assistant", "content": f"{n}"}] for n in range(400)]
    talks[299] = [{"role": "gpt", "content": "x"}]
    write(tmp_path / "a.jsonl", "messages", talks)
    with pytest.raises(
        InputError, match=r"domain 'a' .*: conversation 300: message 1: got role 'g"
    ):
        read(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("texts", "holdout", "said"),
    [
        ([f"document {n}" for n in range(12)], 1e-9, "Raise --holdout"),
        (["one document of few words"], 0.1, "Divide it into several"),
        (["one document of many words " * 20], 0.1, ""),
        ([f"document {n}" for n in range(12)], 0.5, ""),
        ([f"document {n}" for n in range(12)], 0.0, ""),
    ],
)
def test_a_domain_without_held_out_rows_is_named_before_the_teacher_runs(
    texts: list[str],
    holdout: float,
    said: str,
    tmp_path: Path,
    tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path / "a.jsonl", "text", texts)
    read(tmp_path, tokenizer, holdout=holdout)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == bool(said)
    if said:
        assert "domain 'a'" in warnings[0]
        assert "has no held-out rows" in warnings[0]
        assert said in warnings[0]
