"""Documents apart, from end to end: what a document gets alone, it gets in a row of many."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_cache import (
    BuildConfig,
    Cache,
    CacheError,
    InputError,
    MismatchError,
    Teacher,
    build_cache,
    load_teacher,
    open_cache,
)
from ddk_cache.build.estimate import estimate_cache
from ddk_cache.inspect.describe import describe
from ddk_cache.inspect.verify import replay
from ddk_cache.testing import VOCAB, byte_tokenizer, random_teacher, student_config
from ddk_train import CacheDataset, TrainConfig, distillation_loss, measure_gaps, train
from tests.helpers import jsonl, tree

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SIZES: dict[str, Any] = student_config(initializer_range=0.3, num_hidden_layers=2)
GEMMA = SIZES | {"head_dim": 8, "num_key_value_heads": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "gemma3_text": GEMMA | {"sliding_window": 8},
    "gpt2": {
        "vocab_size": VOCAB, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2,
        "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0,
    },
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "seq_len": 47, "targets": "topk:8", "holdout": 0.3, "batch_rows": 4, "chunk_rows": 2,
    "shard_rows": 8, "packing": "documents",
}  # fmt: skip


def write_texts(folder: Path, count: int) -> Path:
    """Write a domain of the first `count` texts of an endless one, of 3 to 60 letters."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcde ", k=draw.randint(3, 60))).strip() for _ in range(count)]
    (folder / "some.jsonl").write_text(jsonl({"text": f"{text}."} for text in texts))
    return folder


def model_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    values = {k: v for k, v in CONFIGS[kind].items() if k not in ("model_type", "architectures")}
    config = AutoConfig.for_model(kind, **values | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def build(path: Path, corpus: Path, teacher: Teacher, **changes: Any) -> Cache:
    grow = changes.pop("grow", False)
    tokenizer = changes.pop("tokenizer", None) or byte_tokenizer()
    config = BuildConfig(**SETTINGS | changes)
    build_cache(path, corpus, teacher, tokenizer, config, grow=grow)
    return open_cache(path)


@torch.no_grad()
def alone(model: Any, cache: Cache, split: str) -> Any:
    """Return (R, S) log-probabilities of labels, each document by itself; 0 at other positions."""
    rows = cache.read("some", split, cache.row_numbers("some", split))
    assert rows.segments is not None
    out = np.zeros(rows.loss_mask.shape)
    for row, (tokens, segments) in enumerate(zip(rows.tokens, rows.segments, strict=True)):
        for number in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == number)
            if len(places) > 1:
                document = torch.from_numpy(tokens[places])[None]
                logp = model(document[:, :-1], use_cache=False).logits.double().log_softmax(-1)
                out[row, places[:-1]] = logp.gather(-1, document[:, 1:, None])[0, :, 0]
    return out


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_position_is_that_of_its_document_alone(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    model.save_pretrained(tmp_path / "model")
    teacher = load_teacher(tmp_path / "model")
    cache = build(tmp_path / "mix.zarr", write_texts(tmp_path / "corpus", 40), teacher)
    expected = {split: alone(model, cache, split) for split in ("train", "validation")}
    for split, logprobs in expected.items():
        rows = cache.read("some", split, cache.row_numbers("some", split))
        assert rows.segments is not None
        assert rows.segments.max() > 2
        mask, step = rows.loss_mask, cache.spec.logprob_step / 2
        np.testing.assert_allclose(rows.label_logprob[mask], logprobs[mask], atol=1e-4 + step)
        inside = (rows.segments[:, 1:] == rows.segments[:, :-1]) & (rows.segments[:, 1:] > 0)
        np.testing.assert_array_equal(mask, inside)  # of text, all counts
        assert (rows.label_logprob[~inside] == 0).all()
        assert (rows.targets.ids[~inside][:, 1:] == -1).all()
        assert (rows.targets.probs[~inside][:, 0] == 1).all()
    assert replay(cache, teacher, 8, 0).bad == ()
    mask = cache.read("some", "validation", cache.row_numbers("some", "validation")).loss_mask
    loss = -expected["validation"][mask].mean()
    found = measure_gaps(model, cache, rows=1000, batch_rows=3)
    assert found.student_loss[0] == pytest.approx(loss, abs=1e-4)
    assert found.excess[0] == pytest.approx(0, abs=1e-3)
    places = cache.row_numbers("some", "train").tolist()
    batch = next(iter(CacheDataset(cache, rows=6)))
    counted = (batch["labels"][:, 1:] >= 0).numpy()
    losses = -expected["train"][[places.index(row) for row in batch["row"].tolist()]]
    found_loss = float(distillation_loss(model, batch, gamma=0.0).detach())
    assert found_loss == pytest.approx(losses[counted].mean(), abs=1e-4)


def test_growth_mending_and_resuming_give_the_same_bytes(tmp_path: Path) -> None:
    corpus, teacher = write_texts(tmp_path / "corpus", 80), random_teacher()
    path = tmp_path / "mix.zarr"
    cache = build(path, corpus, teacher)
    before = tree(path)

    calls = []

    def fails(tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(len(tokens))
        if len(calls) == 9:
            raise RuntimeError("the power went")
        return teacher.logits(tokens)

    failing = Teacher(fails, VOCAB, teacher.identity, takes_positions=True)
    with pytest.raises(CacheError, match="the power went"):
        build(tmp_path / "stopped.zarr", corpus, failing)
    assert list((tmp_path / "stopped.zarr").rglob("commits/**/*.json"))
    build(tmp_path / "stopped.zarr", corpus, teacher, packing="auto")  # as it was begun
    assert tree(tmp_path / "stopped.zarr") == before

    def mend(name: str) -> None:
        for victim in path.glob(f"domains/some/*/{name}/c/0/0"):
            victim.unlink()
        build(path, corpus, teacher, grow=True)

    for name in ("segments", "tokens"):
        mend(name)
        assert tree(path) == before
    rows = cache.plan("some").rows("train")
    build(path, write_texts(corpus, 120), teacher, grow=True)
    grown = tree(path)
    arrays = [name for name in before if "/c/" in name]
    assert all(grown[name] == before[name] for name in arrays)
    portions = open_cache(path).plan("some").portions
    assert len(portions) == 2
    assert portions[0].rows["train"] == rows
    for victim in path.glob("domains/some/*/segments/c/*/0"):
        victim.unlink()
    build(path, corpus, teacher, grow=True)
    assert tree(path) == grown


def test_other_packing_is_named_and_auto_takes_that_of_the_cache(tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus", 40)
    build(tmp_path / "mix.zarr", corpus, random_teacher())
    with pytest.raises(MismatchError, match=r"packing: the cache has documents, .* for stream"):
        build(tmp_path / "mix.zarr", corpus, random_teacher(), packing="stream")
    with pytest.raises(MismatchError, match=r"too_long: the cache has split, .* for drop"):
        build(tmp_path / "mix.zarr", corpus, random_teacher(), too_long="drop")
    build(tmp_path / "mix.zarr", corpus, random_teacher(), packing="auto")
    with pytest.raises(InputError, match="too_long: got 'drop', which is for documents"):
        build(tmp_path / "text.zarr", corpus, random_teacher(), packing="auto", too_long="drop")


def test_conversations_are_kept_apart_by_default_and_text_is_not(tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus", 40)
    cache = build(tmp_path / "text.zarr", corpus, random_teacher(), packing="auto")
    assert cache.spec.packing == "stream"
    talks = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n * n}!"}]
        for n in range(90)
    ]
    (corpus / "talk.jsonl").write_text(jsonl({"messages": t} for t in talks))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    given = {"packing": "auto", "tokenizer": tokenizer}
    cache = build(tmp_path / "chat.zarr", corpus, random_teacher(), **given)
    assert cache.spec.packing == "documents"
    rows = cache["talk"].train[:]
    assert rows.segments is not None
    for tokens, segments, mask in zip(rows.tokens, rows.segments, rows.loss_mask, strict=True):
        for number in range(1, segments.max() + 1):
            text = tokenizer.decode(tokens[segments == number])
            assert text.startswith("[user]")
            assert text.endswith("<|endoftext|>")
            (places,) = np.nonzero(segments == number)
            counted = mask[places[:-1]]
            answer = tokenizer.decode(tokens[places[1:]][counted])
            assert answer == text.split("[assistant]")[1].removesuffix("<|endoftext|>")
    plain = Teacher(lambda tokens: random_teacher().logits(tokens), VOCAB, {"class": "plain"})
    with pytest.raises(InputError, match="a function of tokens alone"):
        build(tmp_path / "plain.zarr", corpus, plain, **given)
    assert not (tmp_path / "plain.zarr").exists()


@pytest.mark.parametrize("too_long", ["split", "drop", "truncate"])
def test_shares_of_padding_and_of_what_is_left_out_are_told(too_long: str, tmp_path: Path) -> None:
    corpus, teacher = write_texts(tmp_path / "corpus", 60), random_teacher()
    settings = {"too_long": too_long, "seq_len": 31}
    cache = build(tmp_path / "mix.zarr", corpus, teacher, **settings)
    facts = describe(cache)["domains"]["some"]
    lengths = [len(json.loads(x)["text"]) + 1 for x in (corpus / "some.jsonl").open()]
    lost = {"split": 0, "drop": sum(n for n in lengths if n > 32),
            "truncate": sum(max(0, n - 32) for n in lengths)}[too_long]  # fmt: skip
    assert facts["lost"] == pytest.approx(lost / sum(lengths))
    rows: list[Any] = [cache["some"][split][:].segments for split in ("train", "validation")]
    assert facts["padding"] == pytest.approx(np.mean(np.concatenate(rows) == 0))
    from ddk_cache.corpus.sources import find_sources

    config = BuildConfig(**SETTINGS | settings)
    planned = estimate_cache("x", find_sources(corpus), byte_tokenizer(), teacher, config)
    for name in ("rows", "padding", "lost"):
        assert planned["domains"]["some"][name] == facts[name]


def test_a_model_with_a_state_is_refused_as_teacher_and_as_student(
    packed_cache: Cache, tmp_path: Path, tokenizer: Any
) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    model.save_pretrained(tmp_path / "mamba")
    corpus, teacher = write_texts(tmp_path / "corpus", 40), load_teacher(tmp_path / "mamba")
    with pytest.raises(InputError, match=r"teacher .*--packing stream"):
        build(tmp_path / "mix.zarr", corpus, teacher)
    paths: dict[str, Any] = {"run": str(tmp_path / "run"), "student": str(tmp_path / "mamba")}
    with pytest.raises(InputError, match=r"the student \(MambaForCausalLM\)"):
        train(TrainConfig(cache=str(packed_cache.root), device="cpu", **paths))
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"the student \(MambaForCausalLM\)"):
        distillation_loss(model, next(iter(CacheDataset(packed_cache, rows=2))))


def test_rows_of_short_conversations_are_almost_full(data: Path, tmp_path: Path) -> None:
    """Word problems in rows of 512: the tokens of the shared teacher's tokenizer."""
    import pyarrow.parquet as pq

    from ddk_cache.corpus.document import Conversation
    from ddk_cache.corpus.packing import DocumentPacker
    from ddk_cache.corpus.rows import encode
    from ddk_cache.hf import load_tokenizer

    tokenizer = load_tokenizer(data / "teacher")
    tokenizer.chat_template = CHAT
    packer = DocumentPacker(512, "split", 0)
    for text in pq.read_table(data / "corpus" / "math_word.parquet")["text"].to_pylist()[:1500]:
        question, answer = text.removeprefix("Question: ").split("\nAnswer: ", 1)
        turns = (("user", question), ("assistant", answer))
        talk = [{"role": role, "content": content} for role, content in turns]
        ((sample,),) = encode(tokenizer, [Conversation(talk)])
        packer.add(sample)
    packer.finish()
    arrays = packer.take(packer.rows)
    assert (arrays["segments"] == 0).mean() < 0.02
