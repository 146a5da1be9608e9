"""Distill into a LoRA adapter with TRL's SFTTrainer: one mixin changes its data and its loss.

python examples/trl_sft.py mix.zarr student/
"""

import sys
from pathlib import Path

from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from ddk_cache import load_tokenizer
from ddk_cache.testing import student_config, tiny_cache
from ddk_train import CacheDataset, DistillationMixin


class DistillationSFT(DistillationMixin, SFTTrainer):
    """SFT whose labels come with the teacher's probabilities."""


path, student = sys.argv[1:]
if not Path(path).exists():
    tiny_cache(path)  # yours comes from `ddk-cache build`

data = CacheDataset(path, rows=8)
trainer = DistillationSFT(
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**student_config())),
    SFTConfig(student, max_steps=10, learning_rate=1e-2, logging_steps=5, bf16=False, report_to=[]),
    train_dataset=data,
    processing_class=load_tokenizer(data.cache.tokenizer_path),
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    gamma=0.2,
)
trainer.train()
trainer.save_model()
