"""Responses: the same bytes however the job is stopped or shared, and what transformers says."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ddk_cache import InputError, MismatchError, find_sources
from ddk_cache.cli import main as cache_main
from ddk_cache.corpus.chat import encode_chat
from ddk_cache.corpus.document import Conversation, PromptResponse
from ddk_cache.corpus.sources import documents
from ddk_cache.rng import key_of
from ddk_cache.sequences.config import SamplingConfig
from ddk_cache.sequences.decode import choose, respond
from ddk_cache.sequences.generate import generate
from ddk_cache.sequences.prompts import Prompt
from tests.helpers import call, tree
from tests.sequences import SAMPLING, STOPS, Material, write_prompts

WORKER = """
import sys, time
from ddk_cache.sequences import generate as job
from ddk_cache.sequences.config import SamplingConfig
from tests.sequences import SAMPLING, Material
from pathlib import Path
made = Material(Path(sys.argv[1]))
responder, plain = made.responder(), job.respond
def slow(*args):
    time.sleep(float(sys.argv[3]))
    return plain(*args)
job.respond = slow
print("ready", flush=True)
config = SamplingConfig(samples=2, **SAMPLING)
job.generate(made.prompts, sys.argv[2], responder, config, rank=int(sys.argv[4]), world=2)
"""
"""A slow job on the prompts of argv[1] into argv[2], for a process that is killed."""


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        row for file in sorted(folder.rglob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def start(made: Material, out: Path, seconds: float, rank: int = 0) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WORKER, made.folder, out, seconds, rank]
    process = subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    process.stdout.readline()
    return process


def wait(process: subprocess.Popen[str], seconds: float | None = None) -> int:
    """Wait for a process, and kill it after so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    code = process.wait()
    assert process.stdout
    process.stdout.close()
    return code


def test_a_response_is_what_the_model_says_with_its_log_probability(material: Material) -> None:
    responder, found = material.responder(), rows(material.out / "sums")
    assert {row["number"] for row in found} == set(range(20))
    assert {row["ended"] for row in found} == {"stop", "length"}
    for row in found:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            logq = responder.model(ids).logits[0].log_softmax(-1)
        first = len(row["prompt_ids"])
        expected = logq[first - 1 : -1].gather(1, ids[0, first:, None]).sum()
        assert row["logprob"] == pytest.approx(float(expected), abs=1e-5 * row["length"])
        assert row["length"] == len(row["response_ids"]) <= 12
        assert (row["ended"] == "stop") == (row["response_ids"][-1] in STOPS)
        assert max(row["response_ids"]) < len(responder.tokenizer)
        assert row["messages"][-1] == {"role": "assistant", "content": row["response"]}
        asked = [{"role": "user", "content": row["prompt"]}]
        assert row["messages"][:-1] == asked
        text = responder.tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True
        )
        assert responder.tokenizer.decode(row["prompt_ids"]) == text


def test_greedy_responses_are_those_of_transformers(material: Material) -> None:
    responder, config = material.responder(), SamplingConfig(temperature=0.0, max_new_tokens=9)
    prompts = [
        Prompt(text, "here").encode(responder.tokenizer) for text in ("a", "some words", "7")
    ]
    found = respond(responder, prompts, [0, 1, 2], config)
    for prompt, response in zip(prompts, found, strict=True):
        out = responder.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=9, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert list(response.ids) == out[0, len(prompt) :].tolist()


def test_a_token_is_drawn_from_its_distribution() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -torch.inf, -1.0]])
    chance = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000

    def shares(temperature: float, top_p: float) -> Any:
        drawn = choose(logits.expand(len(chance), -1).clone(), chance, temperature, top_p)
        return np.bincount(drawn.numpy(), minlength=5) / len(chance)

    p = (logits[0].double() / 0.7).softmax(-1).numpy()
    np.testing.assert_allclose(shares(0.7, 1.0), p, atol=2e-4)
    q = logits[0].double().softmax(-1).numpy()  # 0.09, 0.64, 0.24, 0, 0.03
    np.testing.assert_allclose(shares(1.0, 0.8), [0, *q[1:3] / q[1:3].sum(), 0, 0], atol=2e-4)
    np.testing.assert_allclose(shares(1.0, 0.6), [0, 1, 0, 0, 0])
    top = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert int(choose(logits, top, 1.0, 1.0)[0]) == 4  # never an id without probability, or none


def test_the_random_numbers_of_a_response_are_its_own(material: Material) -> None:
    responder, config = material.responder(), SamplingConfig(**SAMPLING)
    prompts = [Prompt(text, "here").encode(responder.tokenizer) for text in ("a", "some words")]
    keys = [key_of("response", 0, name, 0) for name in ("x", "y")]
    both = respond(responder, prompts, keys, config)
    for prompt, key, response in zip(prompts, keys, both, strict=True):
        (alone,) = respond(responder, [prompt], [key], config)
        assert alone.ids == response.ids
        assert alone.logprob == pytest.approx(response.logprob, abs=1e-4)


def test_the_output_is_a_corpus_of_the_same_domains(material: Material) -> None:
    sources = find_sources(material.out)
    assert [source.name for source in sources] == ["sums", "words"]
    found = list(documents(sources[0]))
    assert len(found) == 40
    for row, document in zip(rows(material.out / "sums"), found, strict=True):
        assert isinstance(document, Conversation)
        ((ids, learned),) = encode_chat(material.tokenizer, document)
        assert ids[: len(row["prompt_ids"])] == row["prompt_ids"]
        assert learned.index(True) == len(row["prompt_ids"])
    metadata = json.loads(pq.read_schema(sources[0].files[0]).metadata[b"ddk"])
    assert metadata["model"] == dict(material.responder().identity)
    assert (metadata["samples"], metadata["temperature"], metadata["top_p"]) == (2, 1.0, 1.0)


def test_a_second_call_writes_nothing_and_other_settings_are_refused(material: Material) -> None:
    before, responder = tree(material.out), material.responder()
    generate(material.prompts, material.out, responder, SamplingConfig(samples=2, **SAMPLING))
    other = SamplingConfig(samples=2, seed=1, **SAMPLING)
    with pytest.raises(MismatchError, match="  seed: it has 0, this call asks for 1"):
        generate(material.prompts, material.out, responder, other)
    assert tree(material.out) == before


class Tired(torch.nn.Module):
    """A model that fails after so many calls."""

    def __init__(self, model: Any, calls: int) -> None:
        super().__init__()
        self.model, self.config, self.calls = model, model.config, calls

    def forward(self, logits_to_keep: int = 0, **given: Any) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise ValueError("tired")
        return self.model(logits_to_keep=logits_to_keep, **given)


def test_a_job_that_failed_is_finished_by_two_workers_with_the_same_bytes(
    material: Material, tmp_path: Path
) -> None:
    responder, config = material.responder(), SamplingConfig(samples=2, **SAMPLING)
    tired = dataclasses.replace(responder, model=Tired(responder.model, 30))
    with pytest.raises(ValueError, match="tired"):
        generate(material.prompts, tmp_path, tired, config)
    parts = tree(tmp_path)
    assert 1 < len(parts) < len(tree(material.out))
    assert not (tmp_path / ".generate" / "claims").exists()
    workers = [
        Thread(target=generate, args=(material.prompts, tmp_path, responder, config),
               kwargs={"rank": rank, "world": 2})
        for rank in (0, 1)
    ]  # fmt: skip
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert tree(tmp_path) == tree(material.out)


@pytest.mark.slow
def test_a_killed_job_of_two_workers_ends_with_the_same_bytes(
    material: Material, tmp_path: Path
) -> None:
    killed = start(material, tmp_path / "out", 0.2)
    while not list((tmp_path / "out").rglob("*.parquet")):
        time.sleep(0.02)
    assert wait(killed, 0.3) == -9
    assert not (tmp_path / "out" / "words").exists()
    workers = [start(material, tmp_path / "out", 0.1, rank) for rank in (0, 1)]
    assert [wait(worker) for worker in workers] == [0, 0]
    assert tree(tmp_path / "out") == tree(material.out)


@pytest.mark.slow
def test_ten_kills_change_nothing(material: Material, tmp_path: Path) -> None:
    chance, out, kills = random.Random(0), tmp_path / "out", 0
    while kills < 10:
        code = wait(start(material, out, 0.3), chance.uniform(0.1, 1.2))
        kills += code == -9
        if code == 0:
            assert tree(out) == tree(material.out)
            shutil.rmtree(out)
    assert wait(start(material, out, 0.0)) == 0
    assert tree(out) == tree(material.out)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ({"text": "x"}, "no column 'messages' or 'prompt'"),
        ({"prompt": "x" * 60}, "expected at most 64 together, the positions of"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
         "the conversation ends with the assistant"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "got role 'boss'"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"type": "function"}]},
                       {"role": "tool", "content": "y"}]}, "message 1 calls tools"),
        ({"messages": "x"}, "column 'messages' holds str, expected a list of messages"),
        ({"prompt": " "}, "holds no prompt"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_answered_are_refused(
    lines: dict[str, Any], said: str, material: Material, tmp_path: Path
) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "some.jsonl").write_text(json.dumps(lines) + "\n")
    with pytest.raises(InputError, match=f"domain 'some': .*{said}"):
        generate(
            tmp_path / "prompts", tmp_path / "out", material.responder(), SamplingConfig(**SAMPLING)
        )
    assert not (tmp_path / "out").exists()


def test_messages_need_a_template_and_texts_do_not(material: Material, tmp_path: Path) -> None:
    responder, config = material.responder(), SamplingConfig(**SAMPLING)
    responder.tokenizer.chat_template = None
    (tmp_path / "talk").mkdir()
    line = json.dumps({"messages": [{"role": "user", "content": "x"}]})
    (tmp_path / "talk" / "some.jsonl").write_text(line)
    with pytest.raises(InputError, match="but the tokenizer has no chat template"):
        generate(tmp_path / "talk", tmp_path / "out", responder, config)
    generate(write_prompts(tmp_path / "prompts", 2), tmp_path / "out", responder, config)
    (first, second) = rows(tmp_path / "out" / "sums")
    assert "messages" not in first
    assert second["prompt"] == "sums 1 sums 1"
    assert responder.tokenizer.decode(second["prompt_ids"]) == "sums 1 sums 1\n"
    said = list(documents(find_sources(tmp_path / "out")[0]))
    assert said == [PromptResponse(row["prompt"], row["response"]) for row in (first, second)]
    for row, document in zip((first, second), said, strict=True):
        assert isinstance(document, PromptResponse)
        ((ids, learned),) = encode_chat(responder.tokenizer, document)
        if not document.response[0].isspace():  # else it is joined to the prompt as it is
            assert ids[: len(row["prompt_ids"])] == row["prompt_ids"]
            assert learned.index(True) == len(row["prompt_ids"])


def test_a_content_of_several_parts_is_joined(material: Material, tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    parts = [{"type": "text", "text": "how "}, {"type": "text", "text": "so"}]
    line = json.dumps({"messages": [{"role": "user", "content": parts, "name": "Ann"}]})
    (tmp_path / "prompts" / "some.jsonl").write_text(line)
    config = SamplingConfig(**SAMPLING)
    generate(tmp_path / "prompts", tmp_path / "out", material.responder(), config)
    (row,) = rows(tmp_path / "out" / "some")
    assert row["messages"][0] == {"role": "user", "content": "how so"}
    assert material.tokenizer.decode(row["prompt_ids"]) == "<u>how so<a>"


def test_a_place_that_holds_something_else_is_left_alone(
    material: Material, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists and is not a directory of responses"):
        generate(material.prompts, tmp_path, material.responder(), SamplingConfig(**SAMPLING))
    assert tree(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"samples": 0}, "samples: got 0, expected a whole number from 1"),
        ({"temperature": -1.0}, "temperature: got -1.0, expected a number from 0 to 100"),
        ({"top_p": 0}, "top_p: got 0, expected more"),
        ({"seed": True}, "seed: got True"),
    ],
)
def test_a_setting_out_of_range_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        SamplingConfig(**change)


def test_the_command_says_what_is_wrong(material: Material, tmp_path: Path) -> None:
    done = call(cache_main, "generate", material.prompts, tmp_path / "out", "--teacher", "/nowhere")
    assert (done.exit_code, "there is no tokenizer at /nowhere" in done.stderr) == (2, True)
