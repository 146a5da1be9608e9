"""A student and its loss: real models taken apart, against their own logits in plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddk_cache import SparseTargets
from ddk_train.lora import add_adapter
from ddk_train.loss.fused import Targets, Terms
from ddk_train.loss.objective import Objective

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 5.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # a head with a bias
}


def make(name: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SMALL | MODELS[name] | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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
    ce, kl = objective.measure(*material()).float()
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
