"""Build a cache with a teacher of your own: any callable from tokens to logits.

python examples/own_teacher.py mix.zarr
"""

import sys
import tempfile
from pathlib import Path

import torch

from ddk_cache import BuildConfig, Teacher, build_cache, open_cache
from ddk_cache.testing import VOCAB, byte_tokenizer, write_corpus


def logits(tokens: torch.Tensor) -> torch.Tensor:
    """Return logits (B, S, V) of tokens (B, S): here, the present byte tends to be repeated."""
    return 4.0 * torch.nn.functional.one_hot(tokens, VOCAB)


# The identity stands for the weights: a build resumes only with the teacher that began it.
teacher = Teacher(logits, VOCAB, {"class": "repeat", "strength": "4"})

path = sys.argv[1]
with tempfile.TemporaryDirectory() as folder:
    corpus = write_corpus(Path(folder) / "corpus")  # your documents: one file or folder per domain
    config = BuildConfig(seq_len=16, targets="topk:8", holdout=0.3)
    build_cache(path, corpus, teacher, byte_tokenizer(), config)

with open_cache(path) as cache:
    for name, domain in cache.items():
        print(f"{name}: {len(domain.train)} rows, loss {domain.train.teacher_loss:.2f} nats")
