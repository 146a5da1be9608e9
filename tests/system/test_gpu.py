"""What only a GPU can show: pinned memory, streams, short types, kernels, and resuming on it.

`scripts/bench.py gpu --part check` runs these. DDK_TEST_DEVICE=cpu rehearses them where there is no
GPU: what is about CUDA alone is skipped, all else runs, so that the tests themselves are tried.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

from ddk_cache import BuildConfig, Teacher, build_cache, load_teacher, open_cache
from ddk_cache.build.scoring import Scorer
from ddk_cache.build.targets import extract
from ddk_cache.format.plan import ShardKey
from ddk_cache.format.spec import TargetSpec
from ddk_cache.read.cache import Cache
from ddk_cache.testing import BUILD, VOCAB, random_teacher, student_config, write_corpus
from ddk_train import train
from ddk_train.data.loader import Batch, Loader
from ddk_train.data.mixture import Mixture
from ddk_train.loss.head import chunk_positions
from ddk_train.run.checkpoint import get_random, set_random
from ddk_train.trainer import Trainer
from tests.helpers import Configure, read_weights, timeless, tree
from tests.runs import copy_up_to, open_trainer

pytestmark = [
    pytest.mark.gpu,
    # Deterministic mode is asked for where bits are compared; torch names what it cannot promise.
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]

DEVICE = torch.device(os.environ.get("DDK_TEST_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"

only_cuda = pytest.mark.skipif(not CUDA, reason="is about CUDA alone")


@contextmanager
def deterministic() -> Iterator[None]:
    """Let attention and other kernels add in one order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def first_batch(trainer: Trainer) -> Batch:
    trainer.measure_if_due()
    return next(iter(trainer.batches_until_due()))


def gradient(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the gradient of the first step."""
    batch = first_batch(trainer)
    trainer.backward(batch, int(batch.counted.sum()))
    named = trainer.student.named_parameters()
    return {n: p.grad.float().cpu() for n, p in named if p.grad is not None}


def near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], part: float) -> None:
    """Compare gradients; `part` is the error relative to the largest entry of each."""
    assert one.keys() == other.keys()
    for name, wanted in one.items():
        error = (other[name] - wanted).abs().max() / wanted.abs().max()
        assert error < part, (name, error)


def loader(cache: Cache, device: torch.device, threads: int) -> Loader:
    extents = {name: cache.extents(name, "train") for name in cache.domains}
    mixture = Mixture(extents, chunk_rows=cache.spec.chunk_rows, rows=5, seed=3)
    return Loader(cache, mixture, device, threads=threads, depth=2)


# --- batches ---


def test_batches_are_those_of_the_cpu_while_their_memory_is_used_again(
    cache: Cache,
) -> None:
    busy = torch.randn(2048, 2048, device=DEVICE) if CUDA else torch.zeros(1)
    wanted, found = loader(cache, torch.device("cpu"), 0), loader(cache, DEVICE, 2)
    held = []
    for _ in range(12):
        for _ in range(50 if CUDA else 0):  # copies wait behind this work
            busy = busy @ busy
        held.append(next(found))
    for batch in held:
        expected = next(wanted)
        assert torch.equal(batch.tokens.cpu(), expected.tokens)
        assert torch.equal(batch.loss_mask.cpu(), expected.loss_mask)
        assert torch.equal(batch.targets.ids.cpu(), expected.targets.ids)
        torch.testing.assert_close(batch.targets.probs.cpu(), expected.targets.probs)
        torch.testing.assert_close(batch.targets.tail.cpu(), expected.targets.tail)
        np.testing.assert_array_equal(batch.counted, expected.loss_mask.sum(1).numpy())
    buffers = found._free.get()
    assert all(tensor.is_pinned() == CUDA for tensor in buffers.tensors.values())
    found.close()


# --- a step ---


@only_cuda
def test_a_step_waits_for_the_device_once(configure: Configure) -> None:
    trainer = open_trainer(configure(device=str(DEVICE), micro_rows=0))
    batch = first_batch(trainer)
    trainer.step(batch)  # the optimizer makes its states
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "synchroniz" in str(one.message)]
    assert len(waits) == 1, waits


@only_cuda
def test_chunks_do_not_depend_on_what_else_is_in_memory() -> None:
    before = chunk_positions(DEVICE, 128_256)
    taken = torch.empty(
        torch.cuda.mem_get_info(DEVICE)[0] * 9 // 10, dtype=torch.uint8, device=DEVICE
    )
    assert chunk_positions(DEVICE, 128_256) == before
    del taken


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradient_is_that_of_the_cpu(configure: Configure, precision: str) -> None:
    wanted = gradient(open_trainer(configure("cpu", device="cpu", precision="fp32")))
    found = gradient(open_trainer(configure("gpu", device=str(DEVICE), precision=precision)))
    near(wanted, found, 1e-3 if precision == "fp32" else 0.1)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd:0.5", "skew_kl:0.1"])
def test_every_loss_falls_in_the_default_precision(configure: Configure, loss: str) -> None:
    run = train(configure(device=str(DEVICE), loss=loss, gamma=1.0, steps=30, interval=30))
    metrics = run.metrics()
    assert metrics[-1]["loss"] < metrics[0]["loss"]


@pytest.mark.parametrize("micro", [0, 2])
def test_accumulation_gives_the_same_gradient(configure: Configure, micro: int) -> None:
    settings: dict[str, Any] = {"device": str(DEVICE), "precision": "fp32"}
    whole = gradient(open_trainer(configure("whole", micro_rows=0, **settings)))
    cut = gradient(open_trainer(configure("cut", micro_rows=micro, **settings)))
    near(whole, cut, 1e-3)


@only_cuda
@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
def test_every_kernel_of_attention_gives_the_same_gradient(
    configure: Configure, backend: str
) -> None:
    settings: dict[str, Any] = {"device": str(DEVICE), "precision": "bf16"}
    wanted = gradient(open_trainer(configure("default", **settings)))
    with sdpa_kernel([getattr(SDPBackend, backend), SDPBackend.MATH], set_priority=True):
        found = gradient(open_trainer(configure("chosen", **settings)))
    near(wanted, found, 0.1)


@only_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_student_gives_the_same_gradient(configure: Configure, precision: str) -> None:
    settings: dict[str, Any] = {"device": str(DEVICE), "precision": precision}
    plain = gradient(open_trainer(configure("plain", **settings)))
    compiled = gradient(open_trainer(configure("compiled", compile=True, **settings)))
    near(plain, compiled, 1e-3 if precision == "fp32" else 0.1)


def test_gradient_checkpointing_changes_little(configure: Configure) -> None:
    settings: dict[str, Any] = {"device": str(DEVICE)}
    plain = gradient(open_trainer(configure("plain", **settings)))
    again = gradient(open_trainer(configure("again", gradient_checkpointing=True, **settings)))
    near(plain, again, 1e-2)


# --- resuming ---


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=only_cuda)])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    configure: Configure, tmp_path: Path, optimizer: str, compiled: bool
) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    config = tmp_path / "student.json"
    # Wide enough for 8-bit states, and with dropout, for the random states of the device.
    config.write_text(json.dumps(student_config(hidden_size=64, attention_dropout=0.1)))
    settings: dict[str, Any] = {
        "device": str(DEVICE), "student": str(config), "optimizer": optimizer, "compile": compiled,
    }  # fmt: skip
    with deterministic():
        whole = train(configure("whole", **settings))
        step, checkpoint = whole.checkpoints()[1]
        assert 0 < step < 12
        path = tmp_path / "resumed"
        copy_up_to(checkpoint, whole, path)
        resumed = train(configure("resumed", **settings))
    assert timeless(resumed.metrics()) == timeless(whole.metrics())
    assert tree(resumed.student) == tree(whole.student)


def test_random_states_come_back() -> None:
    state = get_random(DEVICE)
    wanted = (torch.rand(9), torch.rand(9, device=DEVICE))
    set_random(state, DEVICE)
    assert torch.equal(torch.rand(9), wanted[0])
    assert torch.equal(torch.rand(9, device=DEVICE), wanted[1])


def test_a_run_on_the_device_ends_where_one_on_the_cpu_does(configure: Configure) -> None:
    settings: dict[str, Any] = {"precision": "fp32", "lr": 1e-4}
    wanted = read_weights(train(configure("cpu", device="cpu", **settings)).student)
    found = read_weights(train(configure("gpu", device=str(DEVICE), **settings)).student)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-4)


# --- a build ---


def on_device(teacher: Teacher, dtype: torch.dtype) -> Teacher:
    """Return a teacher whose logits are on the device in this type."""

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return teacher.logits(tokens.cpu()).to(DEVICE, dtype)

    return Teacher(logits, teacher.vocab_size, {"class": "moved"}, "moved", DEVICE)


@pytest.mark.parametrize("kind", ["topk:8", "sampled:6"])
def test_a_build_that_writes_behind_gives_the_same_bytes(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    corpus, found = write_corpus(tmp_path / "corpus"), {}
    teacher = on_device(random_teacher(), torch.float32)
    for name, behind in (("plain", False), ("behind", True)):
        path = tmp_path / f"{name}.zarr"
        config = BuildConfig(**BUILD | {"targets": kind})
        build_cache(path, corpus, teacher, tokenizer, config, write_behind=behind)
        found[name] = tree(path)
    assert found["plain"] == found["behind"]


@pytest.mark.parametrize("kind", ["topk:16", "sampled:12"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [300, 32_001])
def test_targets_are_those_of_the_cpu(kind: str, dtype: torch.dtype, vocab: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 9, vocab, generator=generator) * 4).to(dtype)
    labels = torch.randint(vocab, (2, 9), generator=generator)
    offsets = torch.rand(2, 9, dtype=torch.float64, generator=generator)
    spec = TargetSpec.parse(kind)
    wanted = extract(logits, labels, spec, offsets_BS=offsets)
    found = extract(logits.to(DEVICE), labels.to(DEVICE), spec, offsets_BS=offsets.to(DEVICE))
    for name in ("label_logprob", "tail_logprob"):
        one, other = getattr(wanted, name), getattr(found, name).cpu()
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    # Ids may differ among equals in a short type; what they stand for may not.
    probs, others = wanted.logprobs.exp(), found.logprobs.cpu().exp()
    torch.testing.assert_close(others, probs, rtol=1e-4, atol=1e-6)
    if dtype == torch.float32:
        assert (found.ids.cpu() == wanted.ids).float().mean() > 0.99


@only_cuda
def test_a_batch_that_does_not_fit_is_halved() -> None:
    teacher = on_device(random_teacher(), torch.float32)

    def greedy(tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) > 2:
            torch.empty(2**42, dtype=torch.uint8, device=DEVICE)
        return teacher.logits(tokens)

    large = Teacher(greedy, VOCAB, {}, "greedy", DEVICE)
    spec = BuildConfig(seq_len=16, targets="topk:6").spec(VOCAB, {}, {})
    tokens = np.random.default_rng(0).integers(0, VOCAB, (8, 17))
    scorer = Scorer(large, spec, 8)
    scores = scorer.score(ShardKey("web", "train", 0), tokens, lambda _: None)
    assert scorer.batch_rows == 2
    assert math.isfinite(scores.fidelity["kl"])


# --- real teachers ---


def saved(path: Path, tokenizer: Any) -> Path:
    """Save a small Llama of random weights, which are large enough to tell logits apart."""
    torch.manual_seed(0)
    config = LlamaConfig(**student_config(initializer_range=0.3, num_hidden_layers=2))
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_a_document_in_a_row_is_scored_as_alone(
    attention: str, tokenizer: Any, tmp_path: Path
) -> None:
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("needs flash-attn")
    dtype = "bfloat16" if attention == "flash_attention_2" else "float32"
    settings: dict[str, Any] = {"device": str(DEVICE), "attention": attention, "dtype": dtype}
    teacher = load_teacher(saved(tmp_path, tokenizer), **settings)
    teacher.require_isolation()
    tokens = torch.randint(VOCAB, (1, 25), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    positions = torch.tensor([[*range(10), *range(14)]], device=DEVICE)
    row = teacher(tokens[:, :-1], positions)
    for part in (slice(0, 10), slice(10, 24)):
        alone = teacher(tokens[:, part])
        error = (row[:, part] - alone).abs().max() / alone.abs().max()
        assert error < (1e-5 if dtype == "float32" else 0.05)


def test_a_teacher_on_two_devices_gives_the_cache_of_one(tokenizer: Any, tmp_path: Path) -> None:
    corpus, place = write_corpus(tmp_path / "corpus"), saved(tmp_path / "teacher", tokenizer)
    largest = {0: "60KB", "cpu": "1GB"} if CUDA else {"cpu": "1GB"}
    spread: dict[str, Any] = {"device_map": "auto", "model_kwargs": {"max_memory": largest}}
    losses = []
    for number, how in enumerate(({"device": str(DEVICE)}, spread)):
        teacher = load_teacher(place, dtype="float32", **how)
        path = tmp_path / f"{number}.zarr"
        build_cache(path, corpus, teacher, tokenizer, BuildConfig(**BUILD))
        with open_cache(path) as cache:
            losses.append([cache.teacher_loss(name, "train")[0] for name in cache.domains])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
