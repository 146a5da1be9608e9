"""The trainers of transformers and TRL on a cache: the losses of `ddk-train run`, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from ddk_cache import InputError
from ddk_cache.read.cache import Cache
from ddk_cache.testing import student_config
from ddk_train import (
    CacheDataset,
    DistillationMixin,
    DistillationTrainer,
    DomainWeights,
    GapCallback,
    TrainConfig,
    train,
)
from ddk_train.optim import learning_rate, optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]

SETTINGS: dict[str, Any] = {
    "rows": 6, "micro_rows": 3, "steps": 8, "lr": 1e-2, "gamma": 0.4, "weighting": "uniform",
    "interval": 8, "eval_rows": 4, "log_every": 1, "device": "cpu", "precision": "fp32",
}  # fmt: skip


class Recording(DistillationMixin):
    """Keeps the unrounded loss of every step."""

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        loss = super().compute_loss(*given, **named)
        if not named.get("return_outputs"):
            steps: dict[int, float] = self.__dict__.setdefault("losses", {})
            step = self.state.global_step
            steps[step] = steps.get(step, 0.0) + float(loss.detach())
        return loss


class Ours(Recording, DistillationTrainer):
    pass


def sft() -> Any:
    trl = pytest.importorskip("trl")
    return type("Sft", (Recording, trl.SFTTrainer), {})


def model() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**student_config())
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def arguments(folder: Path, kind: type = TrainingArguments, **changes: Any) -> Any:
    return kind(
        **{
            "output_dir": str(folder),
            "max_steps": SETTINGS["steps"],
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 1.0,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        | changes
    )


def optimizers(student: Any) -> tuple[Any, Any]:
    """Return the optimizer of `ddk-train` and its learning rate, as a Trainer takes them."""
    config = TrainConfig(cache="", run="", student="", **SETTINGS)
    adamw = optimizer(student, config)

    def rate(step: int) -> float:
        return learning_rate(config, step) / config.lr

    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, rate)


def trainer(kind: Any, cache: Cache, args: Any, **settings: Any) -> Any:
    student = settings.pop("model", None) or model()
    data = settings.pop("data", None) or CacheDataset(cache, rows=3)
    return kind(
        model=student, args=args, train_dataset=data, gamma=0.4,
        optimizers=optimizers(student), **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wanted(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of `ddk-train run`."""
    folder = tmp_path_factory.mktemp("ours")
    (folder / "s.json").write_text(json.dumps(student_config()))
    paths: dict[str, Any] = {
        "cache": str(cache.root),
        "run": str(folder / "run"),
        "student": str(folder / "s.json"),
    }
    run = train(TrainConfig(**paths, **SETTINGS))
    return [line["loss"] for line in run.metrics()]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainer_of_transformers_has_the_losses_of_ddk_train(
    workers: int, cache: Cache, wanted: list[float], tmp_path: Path
) -> None:
    found = trainer(Ours, cache, arguments(tmp_path, dataloader_num_workers=workers))
    found.train()
    np.testing.assert_allclose(list(found.losses.values()), wanted, rtol=2e-5)
    logged = [line["loss"] for line in found.state.log_history if "loss" in line]
    np.testing.assert_allclose(logged, wanted, atol=1e-3)


def test_the_sft_trainer_of_trl_has_them_too(
    cache: Cache, wanted: list[float], tokenizer: Any, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    args = arguments(tmp_path, trl.SFTConfig, bf16=False, gradient_checkpointing=False)
    found = trainer(sft(), cache, args, processing_class=tokenizer)
    found.train()
    np.testing.assert_allclose(list(found.losses.values()), wanted, rtol=2e-5)


def test_documents_apart_give_the_losses_of_ddk_train(packed_cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(student_config()))
    paths: dict[str, Any] = {"run": str(tmp_path / "run"), "student": str(tmp_path / "s.json")}
    run = train(TrainConfig(cache=str(packed_cache.root), **paths, **SETTINGS))
    data = CacheDataset(packed_cache, rows=3)
    assert next(iter(data))["position_ids"].shape == (3, 41)
    found = trainer(Ours, packed_cache, arguments(tmp_path))
    found.train()
    wanted = [line["loss"] for line in run.metrics()]
    np.testing.assert_allclose(list(found.losses.values()), wanted, rtol=2e-5)


def test_an_adapter_alone_is_trained(cache: Cache, tokenizer: Any, tmp_path: Path) -> None:
    peft, trl = pytest.importorskip("peft"), pytest.importorskip("trl")
    args = arguments(tmp_path, trl.SFTConfig, bf16=False, gradient_checkpointing=False, max_steps=3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    found = sft()(
        model=model(), args=args, train_dataset=CacheDataset(cache, rows=6),
        processing_class=tokenizer, peft_config=config,
    )  # fmt: skip
    found.train()
    changed = [
        n for n, p in found.model.named_parameters() if p.grad is not None or p.requires_grad
    ]
    assert changed
    assert all("lora_" in name for name in changed)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_has_the_losses_of_the_whole_run(
    workers: int, cache: Cache, tmp_path: Path
) -> None:
    def run(folder: str, resume: bool = False) -> Any:
        args = arguments(
            tmp_path / folder, save_strategy="steps", save_steps=3, dataloader_num_workers=workers
        )
        moving = GapCallback(DomainWeights("gain", cache.domains, rho=1.0), interval=2, rows=4)
        made = trainer(Ours, cache, args, callbacks=[moving])
        made.train(
            resume_from_checkpoint=str(tmp_path / folder / "checkpoint-3") if resume else None
        )
        return made

    whole, resumed = run("run"), run("run", resume=True)
    assert list(resumed.losses) == [3, 4, 5, 6, 7]
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(whole.losses[step], rel=1e-6)
    lines, again = (
        [line for line in one.state.log_history if "weight/notes" in line]
        for one in (whole, resumed)
    )
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    for name in cache.domains:
        shares = [[line[f"weight/{name}"] for line in some[-3:]] for some in (lines, again)]
        assert shares[0] == pytest.approx(shares[1], rel=1e-4)
    assert sum(lines[-1][f"weight/{name}"] for name in cache.domains) == pytest.approx(1)


def test_it_evaluates_on_held_out_rows(cache: Cache, tmp_path: Path) -> None:
    held_out = CacheDataset(cache, rows=4, split="validation", weights="proportional", epochs=1)
    found = trainer(Ours, cache, arguments(tmp_path, max_steps=1), eval_dataset=held_out)
    assert 4 < found.evaluate()["eval_loss"] < 9


def test_other_data_are_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got a list, expected a CacheDataset"):
        trainer(DistillationTrainer, cache, arguments(tmp_path), data=[1])
