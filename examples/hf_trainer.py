"""Distill into a student with the Trainer of transformers; domain weights follow the gaps.

python examples/hf_trainer.py mix.zarr student/
"""

import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from ddk_cache import load_tokenizer
from ddk_cache.testing import student_config, tiny_cache
from ddk_train import CacheDataset, DistillationTrainer, DomainWeights, GapCallback

path, student = sys.argv[1:]
if not Path(path).exists():
    tiny_cache(path)  # yours comes from `ddk-cache build`

data = CacheDataset(path, rows=8)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**student_config()))
gaps = GapCallback(DomainWeights("excess", data.domains), interval=10, rows=20)
args = TrainingArguments(student, max_steps=30, learning_rate=1e-2, logging_steps=10, report_to=[])

trainer = DistillationTrainer(
    model,
    args,
    train_dataset=data,
    gamma=0.2,
    callbacks=[gaps],
    processing_class=load_tokenizer(data.cache.tokenizer_path),
)
trainer.train()
trainer.save_model()

for line in trainer.state.log_history:
    if "kl/notes" in line:
        print({name: round(value, 3) for name, value in line.items()})
