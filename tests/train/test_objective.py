"""A student and its loss: real models taken apart, against their own logits in plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from ddk_cache import InputError, SparseTargets
from ddk_train.loss.divergences import LOSSES, divergence
from ddk_train.loss.fused import Targets, Terms
from ddk_train.loss.objective import Objective, distillation_loss, parts_of, places
from ddk_train.student.lora import add_adapter
from tests.helpers import random_model

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 5.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # a head with a bias
}


def make(name: str, **settings: Any) -> Any:
    model = random_model(name, **{"vocab_size": 60} | MODELS[name] | settings)
    with torch.no_grad():  # logits large enough for a cap to bend them
        model.get_output_embeddings().weight.mul_(20)
    return model


def material(K: int = 5) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Return (B, S+1) tokens, (B, S) mask and (B, S, K) targets."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(60, (3, 9), generator=g)
    mask = torch.rand(3, 8, generator=g) < 0.7
    teacher = torch.randn(3, 8, 60, generator=g).mul(3).softmax(-1)
    probs, ids = teacher.topk(K)
    return tokens, mask, SparseTargets(ids, probs, 1 - probs.sum(-1))


def plainly(model: Any, gamma: float) -> torch.Tensor:
    """Return CE + γ KL from the model's own logits, each term written out."""
    tokens, mask, targets = material()
    logq = model(input_ids=tokens[:, :-1], use_cache=False).logits.log_softmax(-1)
    ce = -logq.gather(-1, tokens[:, 1:, None])[..., 0]
    kept = logq.gather(-1, targets.ids)
    rest = logq.scatter(-1, targets.ids, -torch.inf).logsumexp(-1)
    kl = (targets.probs * (targets.probs.log() - kept)).sum(-1)
    kl = kl + targets.tail * (targets.tail.log() - rest)
    loss: torch.Tensor = (ce + gamma * kl)[mask].sum()
    return loss


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_model_itself(name: str) -> None:
    model = make(name).eval()
    objective = Objective(model, Terms(0.4), 60, bf16=False)
    assert objective.parts is not None
    sums, expected = objective(*material()), plainly(model, 0.4)
    torch.testing.assert_close(sums.loss, expected, rtol=1e-5, atol=1e-4)
    got, wanted = gradients(model, sums.loss), gradients(model, expected)
    assert got.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-3, atol=2e-5 * (1 + scale))
    ce, kl = objective.measure(*material()).sum(1).float()
    torch.testing.assert_close((ce, kl), (sums.ce, sums.divergence), rtol=1e-5, atol=1e-4)


def test_a_model_with_another_head_uses_its_own_logits_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import LlamaForCausalLM

    class Odd(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *given: Any, **named: Any) -> Any:
            out = super().forward(*given, **named)
            out.logits = 50 * torch.tanh(out.logits / 50)
            return out

    model = Odd(make("llama").config).eval()
    objective = Objective(model, Terms(0.4), 60, bf16=False)
    assert "Odd changes its logits after its head in an unknown way" in caplog.text
    sums, expected = objective(*material()), plainly(model, 0.4)
    got, wanted = gradients(model, sums.loss), gradients(model, expected)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-4, atol=1e-5)


def test_the_warning_names_why_a_head_cannot_be_applied_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import LlamaForCausalLM

    class Half(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *given: Any, **named: Any) -> Any:
            if self.dtype == torch.float32:
                raise RuntimeError("only fp16 and bf16 are supported")
            return super().forward(*given, **named)

    assert parts_of(Half(make("llama").config)) is None
    assert "the head of Half cannot be applied apart (only fp16 and bf16 are" in caplog.text


def test_an_adapter_leaves_the_head_fused_and_alone_gets_gradients() -> None:
    pytest.importorskip("peft")
    model = add_adapter(make("llama"), 2)
    objective = Objective(model, Terms(0.4), 60, bf16=False)
    assert objective.parts is not None
    got = gradients(model, objective(*material()).loss)
    assert got
    assert all("lora_" in name for name in got)


def test_bfloat16_is_near_float32() -> None:
    model = make("qwen2")
    exact, short = (Objective(model, Terms(0.4), 60, bf16)(*material()) for bf16 in (False, True))
    torch.testing.assert_close(short.loss, exact.loss, rtol=2e-2, atol=0.0)


# --- the loss for any training loop ---------------------------------------------------------------


def as_batch() -> dict[str, torch.Tensor]:
    """Return the material as a batch of a CacheDataset."""
    tokens, mask, targets = material()
    labels = torch.full_like(tokens, -100)
    labels[:, 1:][mask] = tokens[:, 1:][mask]
    return {
        "input_ids": tokens,
        "labels": labels,
        "target_ids": targets.ids,
        "target_probs": targets.probs,
        "target_tail": targets.tail,
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_distillation_loss_is_the_mean_over_counted_positions(name: str) -> None:
    model, positions = make(name).eval(), int(material()[1].sum())
    found, expected = distillation_loss(model, as_batch(), gamma=0.4), plainly(model, 0.4)
    torch.testing.assert_close(found, expected / positions, rtol=1e-5, atol=1e-5)
    got, wanted = gradients(model, found), gradients(model, expected / positions)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-3, atol=1e-5)
    halves = [{k: v[part] for k, v in as_batch().items()} for part in (slice(2), slice(2, None))]
    parts = [distillation_loss(model, h, gamma=0.4, positions=positions) for h in halves]
    torch.testing.assert_close(parts[0] + parts[1], found)


def test_a_narrow_student_gives_the_loss_of_the_objective() -> None:
    model = make("llama", vocab_size=50).eval()
    batch = as_batch()
    batch["input_ids"] %= 50
    batch["labels"] = batch["labels"].where(batch["labels"] < 0, batch["labels"] % 50)
    targets = SparseTargets(batch["target_ids"], batch["target_probs"], batch["target_tail"])
    mask = batch["labels"][:, 1:] != -100
    sums = Objective(model, Terms(0.2), 60, bf16=False)(batch["input_ids"], mask, targets)
    found = distillation_loss(model, batch)
    torch.testing.assert_close(found, sums.loss / mask.sum())


def test_the_loss_of_a_model_in_ddp_reduces_its_gradients(tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = make("llama")
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        reduced: list[str] = []
        wrapped.register_comm_hook(None, lambda _, bucket: count(reduced, bucket))
        wanted = gradients(model, distillation_loss(model, as_batch()))
        got = gradients(model, distillation_loss(wrapped, as_batch()))
        assert reduced
        for parameter, gradient in wanted.items():
            torch.testing.assert_close(got[parameter], gradient)
    finally:
        dist.destroy_process_group()


def count(seen: list[str], bucket: Any) -> Any:
    seen.append("bucket")
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_the_loss_works_behind_accelerate_with_an_adapter() -> None:
    pytest.importorskip("peft")
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    model = add_adapter(make("llama"), 2)
    plain = distillation_loss(model, as_batch())
    found = distillation_loss(accelerator.prepare(model), as_batch())
    torch.testing.assert_close(found, plain)
    assert all("lora_" in name for name in gradients(model, found))


def test_under_autocast_products_are_in_bfloat16() -> None:
    model = make("qwen2")
    exact = distillation_loss(model, as_batch())
    with torch.autocast("cpu", torch.bfloat16):
        short = distillation_loss(model, as_batch())
    assert short != exact
    torch.testing.assert_close(short, exact, rtol=2e-2, atol=0.0)


def test_a_model_is_taken_apart_once_and_again_with_another_head() -> None:
    model = make("llama")
    parts = parts_of(model)
    assert parts_of(model) is parts
    model.set_output_embeddings(torch.nn.Linear(16, 60, bias=False))
    replaced = parts_of(model)
    assert replaced
    assert replaced.linear is model.get_output_embeddings()


def test_a_batch_without_targets_is_named() -> None:
    batch = as_batch()
    del batch["target_tail"]
    with pytest.raises(InputError, match="has no target_tail"):
        distillation_loss(make("llama"), batch)
    with pytest.raises(InputError, match="Did you mean 'forward_kl'"):
        distillation_loss(make("llama"), as_batch(), loss="forward_k")


# --- what a GPU would make the host wait for -----------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "cohere", "phi"])
def test_the_number_of_counted_positions_changes_nothing_else(name: str) -> None:
    model = make(name)
    objective = Objective(model, Terms(0.4), 60, bf16=False)
    tokens, mask, targets = material()
    whole = torch.ones_like(mask)
    for counts in (mask, whole, torch.zeros_like(mask)):
        sums = objective(tokens, counts, targets)
        given = objective(tokens, places(counts, int(counts.sum())), targets)
        assert all(torch.equal(one, other) for one, other in zip(sums, given, strict=True))
        wanted, got = gradients(model, sums.loss), gradients(model, given.loss)
        assert all(torch.equal(wanted[n], got[n]) for n in wanted)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cut", [0, 1])
def test_a_step_asks_the_device_for_no_value(loss: str, cut: int) -> None:
    """Fake tensors have no values: whatever waits for one raises."""
    terms = Terms(0.4, divergence(loss.replace("BETA", "0.5").replace("ALPHA", "0.1")))
    objective = Objective(make("llama"), terms, 60, bf16=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens, mask = torch.zeros(3, 9, dtype=torch.int64), torch.ones(3, 8, dtype=torch.bool)
        ids, tail = torch.zeros(3, 8, 5, dtype=torch.int64), torch.zeros(3, 8)
        targets = SparseTargets(ids, torch.zeros(3, 8, 5), tail)
        sums = objective(tokens, places(mask, mask.numel() - cut), targets)
        (sums.loss / 9).backward()
        with pytest.raises(DynamicOutputShapeException, match="nonzero"):
            objective(tokens, mask, targets)
