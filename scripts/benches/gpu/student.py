"""A real run: a teacher of 69 M parameters, students of 15 M, five ways to spend their tokens.

The corpus is that of `DDK_DATA`, or else the demo's, from files of the Python installation. The
teacher starts fresh and is trained by the trainer itself, with γ = 0, from a cache of its untrained
self, so no other training code is needed. With `--work`, finished runs are not repeated: a second
call goes on where the time of the first was over.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benches.common import data
from benches.domains import METHODS, Bench, make_cache
from benches.gpu.job import Job
from benches.outcomes import Found, outcome, tell
from benches.shared import SEQ_LEN
from ddk_cache import open_cache
from ddk_cache.hf import load_tokenizer
from ddk_cache.testing import byte_tokenizer
from ddk_train import TrainConfig, train

NAMES = ("CPT", "KD proportional", "DDK", "KD uniform", "excess")
"""Methods of `bench.py domains`; the last is the rule that is recommended."""

TEACHER = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "heads": 12}
STUDENT = {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "heads": 5}
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "heads": 2}

FULL_SIZES: dict[str, Any] = {
    "tokens": 8_000_000, "targets": "sampled:24", "seeds": 3,
    "teacher steps": 1500, "warm steps": 300,
    "run": {"steps": 1000, "interval": 200, "rows": 64, "eval_rows": 64, "lr": 1e-3, "warmup": 100},
}  # fmt: skip
TINY_SIZES: dict[str, Any] = {
    "tokens": 18_000, "targets": "topk:4", "seeds": 1, "teacher steps": 2, "warm steps": 2,
    "run": {"steps": 2, "interval": 1, "rows": 2, "eval_rows": 1, "lr": 1e-3, "warmup": 0},
}  # fmt: skip


def measure(job: Job) -> None:
    """Train teacher and students as far as the time goes; show every method of finished seeds."""
    sizes = TINY_SIZES if job.tiny else FULL_SIZES
    job.record.facts["sizes"] = sizes
    names = NAMES[-1:] if job.tiny else NAMES
    job.work.mkdir(parents=True, exist_ok=True)
    if not job.time_for("the teacher"):
        return
    place, path = trained(job, sizes), job.work / "mix.zarr"
    make_cache(path, place, "corpus", sizes | {"holdout": 0.2})
    cache = open_cache(path)
    student = job.work / "student.json"
    student.write_text(json.dumps(llama(TINY if job.tiny else STUDENT, cache.spec.vocab_size)))
    warm = {"steps": sizes["warm steps"], "interval": sizes["warm steps"], "lr": 3e-3}
    settings = sizes["run"] | {"gamma": 0.2, "keep": 1, "device": str(job.device)}
    bench = Bench(path, student, job.work / "runs", settings, warm)
    found: dict[str, list[Found]] = {}
    for seed in range(sizes["seeds"]):
        if whole := one_seed(job, bench, seed, names):
            for name, one in whole.items():
                found.setdefault(name, []).append(one)
    if found:
        tell(job.record, found, sorted(cache.domains), "KD uniform")


def one_seed(job: Job, bench: Bench, seed: int, names: Sequence[str]) -> dict[str, Found] | None:
    """Return every method of a seed, or None where the time was over."""
    found = {}
    if not job.time_for(f"seed {seed}: the start"):
        return None
    found["at the start"] = outcome(bench.warmed(seed))
    for name in names:
        if not job.time_for(f"seed {seed}: {name}"):
            return None
        found[name] = bench.method(name, METHODS[name], seed)
    return found


# --- the teacher ---


def trained(job: Job, sizes: Mapping[str, Any]) -> Path:
    """Return a folder of corpus/ and teacher/; the teacher is trained here, once."""
    place, fresh = job.work / "trained", job.work / "untrained"
    if (place / "teacher").exists():
        return place
    if not (fresh / "teacher").exists():
        corpus_and_tokenizer(job, fresh)
    settings = dict(sizes) | {"holdout": 0.2, "targets": "topk:1"}
    make_cache(job.work / "untrained.zarr", fresh, "corpus", settings)
    run = train(
        TrainConfig(
            cache=str(job.work / "untrained.zarr"), run=str(job.work / "teacher-run"),
            student=str(fresh / "teacher"), steps=sizes["teacher steps"], gamma=0.0,
            weighting="proportional", interval=max(1, sizes["teacher steps"] // 3), lr=6e-4,
            rows=sizes["run"]["rows"], eval_rows=sizes["run"]["eval_rows"], keep=1,
            device=str(job.device),
        )
    )  # fmt: skip
    place.mkdir(exist_ok=True)
    shutil.copytree(fresh / "corpus", place / "corpus", dirs_exist_ok=True)
    shutil.copytree(run.student, place / "teacher")
    return place


def corpus_and_tokenizer(job: Job, place: Path) -> None:
    """Write the corpus as Parquet, and an untrained teacher with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    corpus = place / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    if "DDK_DATA" in os.environ and not job.tiny:
        shutil.copytree(data() / "corpus", corpus, dirs_exist_ok=True)
        tokenizer = load_tokenizer(data() / "teacher")
    else:
        for name, texts in (tiny_texts() if job.tiny else demo_texts()).items():
            pq.write_table(pa.table({"text": texts}), corpus / f"{name}.parquet")
        tokenizer = byte_tokenizer() if job.tiny else demo_tokenizer(corpus)
    torch.manual_seed(0)
    shape = llama(TINY if job.tiny else TEACHER, len(tokenizer))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
    model.save_pretrained(place / "partial")
    tokenizer.save_pretrained(place / "partial")
    (place / "partial").rename(place / "teacher")


def llama(shape: Mapping[str, int], vocab_size: int) -> dict[str, Any]:
    """Return the config.json of a Llama."""
    heads = {"num_attention_heads": shape["heads"], "num_key_value_heads": shape["heads"]}
    sizes = {name: size for name, size in shape.items() if name != "heads"}
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    rest = {"max_position_embeddings": 4 * SEQ_LEN, "tie_word_embeddings": True}
    return kind | sizes | heads | rest | {"vocab_size": vocab_size}


def tiny_texts() -> dict[str, list[str]]:
    """Return documents of three domains that differ in their letters."""
    draw = random.Random(0)
    alphabets = {"digits": "0123456789", "letters": "abcde ", "notes": "xyz\n "}
    return {n: ["".join(draw.choices(a, k=600)) for _ in range(24)] for n, a in alphabets.items()}


def demo_texts() -> dict[str, list[str]]:
    """Return the documents of the demo, by domain."""
    from demo_material import DOMAINS, choose

    return {name: choose(texts()) for name, texts in DOMAINS.items()}


def demo_tokenizer(corpus: Path) -> Any:
    """Return the demo's tokenizer, trained on a corpus."""
    from demo_material import train_tokenizer

    return train_tokenizer(corpus)
