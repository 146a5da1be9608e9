"""What others have written becomes a cache: the values are those that the files give."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ddk_cache import InputError, open_cache
from ddk_cache.build.config import BuildConfig
from ddk_cache.cli import main
from ddk_cache.inspect.verify import verify
from ddk_cache.read.cache import Cache
from ddk_cache.transfer.imported import import_cache
from ddk_cache.types import Array
from tests.helpers import call, jsonl, quiet, tree

V, K = 257, 6
CONFIG = BuildConfig(seq_len=16, chunk_rows=2, shard_rows=4, holdout=0.3)

Document = tuple[Array, Array]
"""Tokens (L), and the float64 log-probabilities (L, V) of the token after each."""


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Documents drawn from a teacher that knows the token before."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(V, V)) * 3
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = []
    for _ in range(12):
        tokens = [int(generator.integers(V))]
        for _ in range(int(generator.integers(20, 60))):
            tokens.append(int(generator.choice(V, p=np.exp(logprobs[tokens[-1]]))))
        found.append((np.array(tokens), logprobs[tokens]))
    return found


def top(logprobs: Array) -> list[int]:
    """Return the K likeliest ids."""
    return [int(i) for i in np.argsort(-logprobs)[:K]]


def as_columns(documents: list[Document], own: bool) -> list[dict[str, Any]]:
    """Write documents as axolotl does: a distribution per token, of it (`own`) or of the next."""
    records = []
    for tokens, logprobs in documents:
        ids = [top(row) for row in logprobs]
        values = [[float(row[i]) for i in place] for row, place in zip(logprobs, ids, strict=True)]
        mask = [[1] * K for _ in tokens]
        if own:
            ids = [list(range(K)), *ids[:-1]]
            values = [[-np.inf] * K, *values[:-1]]
            mask = [[0] * K, *mask[:-1]]
        labels = [-100, -100, -100, *tokens[3:].tolist()]
        records.append(
            {"input_ids": tokens.tolist(), "labels": labels, "target_token_ids": ids,
             "target_logprobs": values, "target_mask": mask}
        )  # fmt: skip
    return records


def as_prompts(documents: list[Document], served: bool = False) -> list[dict[str, Any]]:
    """Write documents as vLLM does: K entries and the token itself, whatever its rank."""
    records = []
    for tokens, logprobs in documents:
        places: list[Any] = [None]
        for token, row in zip(tokens[1:].tolist(), logprobs, strict=False):
            ranks = (-row).argsort().argsort() + 1
            known = dict.fromkeys([token, *top(row)])
            places.append(
                {str(i): {"logprob": float(row[i]), "rank": int(ranks[i])} for i in known}
            )
        record: dict[str, Any] = {"prompt_token_ids": tokens.tolist(), "prompt_logprobs": places}
        records.append({"response": {"body": {"choices": [record]}}} if served else record)
    return records


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text(jsonl(records))
    return path


def compare(cache: Cache, documents: list[Document], label_is_known: bool) -> None:
    """Compare every row with the documents, joined as a build joins them."""
    codec = cache.codec("data")
    stream: dict[tuple[int, ...], Array] = {}
    for tokens, logprobs in documents:
        for at in range(len(tokens) - 1):
            stream[tuple(tokens[max(0, at - 3) : at + 2])] = logprobs[at]
    seen = 0
    for split in cache["data"].values():
        rows = split[:]
        for row in range(len(rows.tokens)):
            for s in np.flatnonzero(rows.loss_mask[row]):
                window = tuple(rows.tokens[row, max(0, s - 3) : s + 2])
                if len(window) < 5 or window not in stream:
                    continue
                seen += 1
                truth = stream[window]
                ids, probs = rows.targets.ids[row, s], rows.targets.probs[row, s]
                label = int(rows.tokens[row, s + 1])
                expected = set(top(truth)) | ({label} if label_is_known else set())
                assert set(ids[ids >= 0].tolist()) == expected
                given = np.exp(truth[ids[ids >= 0]])
                bound = codec.prob.error(given)
                off = np.abs(probs[ids >= 0] - given)
                assert (off <= bound + given * bound.sum() + bound.sum() * (off == off.max())).all()
                assert rows.targets.tail[row, s] == pytest.approx(1 - given.sum(), rel=0.01)
                if label in expected:
                    found = rows.label_logprob[row, s]
                    assert found == pytest.approx(truth[label], abs=codec.logprob.error + 1e-6)
                else:
                    assert rows.label_logprob[row, s] >= truth[label] - codec.logprob.error
    assert seen > 100


def test_columns(documents: list[Document], tokenizer: Any, tmp_path: Path) -> None:
    """Both ways to count positions give the same rows."""
    for name, own in (("own", True), ("next", False)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "data.parquet", as_columns(documents, own))
        source = tmp_path / name / "data.parquet"
        import_cache(source, tmp_path / f"{name}.zarr", tokenizer, CONFIG)
    one, two = (open_cache(tmp_path / f"{name}.zarr") for name in ("own", "next"))
    assert not verify(one, quiet)
    compare(one, documents, label_is_known=False)
    for split in ("train", "validation"):
        ours, theirs = (c["data"][split][:] for c in (one, two))
        np.testing.assert_array_equal(ours.targets.probs, theirs.targets.probs)
        np.testing.assert_array_equal(ours.loss_mask, theirs.loss_mask)
    assert str(one.spec.targets) == "topk:6:1.0"
    assert one.spec.teacher == {"class": "imported", "format": "target_token_ids"}
    assert "of" in one.manifest.root.provenance["label_logprob"]


@pytest.mark.parametrize("served", [False, True])
def test_prompt_logprobs(
    served: bool, documents: list[Document], tokenizer: Any, tmp_path: Path
) -> None:
    source = write(tmp_path / "data.jsonl", as_prompts(documents, served))
    import_cache(source, tmp_path / "mix.zarr", tokenizer, CONFIG)
    cache = open_cache(tmp_path / "mix.zarr")
    compare(cache, documents, label_is_known=True)
    assert cache.manifest.root.provenance["label_logprob"].startswith("unknown at 0 of")


def run(*words: object) -> None:
    """Run `ddk-cache`."""
    done = call(main, *words)
    assert done.exit_code == 0, done.output


def test_the_command_resumes_and_its_caches_combine(
    documents: list[Document], teacher_dir: Path, tmp_path: Path
) -> None:
    one, two, both = (tmp_path / f"{name}.zarr" for name in ("one", "two", "both"))
    how = ("--tokenizer", teacher_dir, "--seq-len", 16, "--vocab-size", 300)
    for cache, part in ((one, documents[:6]), (two, documents[6:])):
        source = write(cache.with_suffix(".jsonl"), as_prompts(part))
        run("import", source, cache, *how)
    whole = tree(one)
    (one / "commits/one/train/0.json").unlink()
    shutil.rmtree(one / "domains/one/train/target_ids/c")
    run("import", tmp_path / "one.jsonl", one, *how)
    assert tree(one) == whole
    run("copy", one, two, both)
    assert open_cache(both).domains == ["one", "two"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("input_ids"), r"data.jsonl, record 1: got KeyError\('input_ids'\)"),
        (lambda r: r.pop("target_token_ids"), "record 1: got KeyError"),
        (lambda r: r["target_logprobs"].pop(), "record 1: got ValueError"),
        (lambda r: r["input_ids"].pop(), "tokens and"),
        (lambda r: r["target_token_ids"][5].__setitem__(0, 999), "got an id of 999"),
        (lambda r: r["target_logprobs"][5].__setitem__(0, 2.0), "probabilities with a sum of"),
    ],
)
def test_what_cannot_be_imported_is_said(
    change: Callable[[dict[str, Any]], Any],
    message: str,
    documents: list[Document],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    records = as_columns(documents[:2], own=False)
    for record in records:
        del record["target_mask"], record["labels"]
    change(records[0])
    write(tmp_path / "data.jsonl", records)
    with pytest.raises(InputError, match=message):
        import_cache(tmp_path / "data.jsonl", tmp_path / "mix.zarr", tokenizer, CONFIG)
    assert not (tmp_path / "mix.zarr").exists()


def test_wrong_sources(documents: list[Document], tokenizer: Any, tmp_path: Path) -> None:
    place = tmp_path / "mix.zarr"
    with pytest.raises(InputError, match=r"got no file, expected \.parquet"):
        import_cache(tmp_path, place, tokenizer, CONFIG)
    write(tmp_path / "data.jsonl", as_prompts(documents[:1]))
    with pytest.raises(InputError, match="expected at least one row of 1025"):
        import_cache(tmp_path / "data.jsonl", place, tokenizer)
    write(tmp_path / "more.jsonl", as_columns(documents[:1], own=True))
    with pytest.raises(InputError, match="in one source, expected one format"):
        import_cache(tmp_path, place, tokenizer, CONFIG, domain="data")
    assert not place.exists()
