"""A teacher behind a serving engine: the local teacher's cache, and refusals of what is wrong."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from ddk_cache import CacheError, InputError
from ddk_cache.build import targets as targets_module
from ddk_cache.build.targets import extract
from ddk_cache.build.teacher import Call, Teacher
from ddk_cache.cli import main
from ddk_cache.format.spec import TargetSpec
from ddk_cache.head import Head, extract_head
from ddk_cache.hf import load_tokenizer
from ddk_cache.inspect.describe import describe, show
from ddk_cache.models.load import load_teacher
from ddk_cache.read.cache import Cache
from ddk_cache.served.teacher import HiddenTeacher, load_served
from ddk_cache.testing import student_config
from tests.helpers import tree
from tests.s3 import free_port
from tests.teacher_server import CALLS, TeacherServer, serving

Make = Callable[..., Cache]
TOP8 = TargetSpec.parse("topk:8")
HIDDEN_ONLY = tuple(call for call in CALLS if call != "/v1/completions")
LOGPROBS_ONLY = tuple(call for call in CALLS if call != "/pooling")


@pytest.fixture(scope="module")
def model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose distributions have a shape, though they know nothing of text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("served") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(**student_config(hidden_size=32, initializer_range=0.2))
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def words(model: Path) -> Any:
    """The model's tokenizer, with the configuration of the model beside it."""
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[TeacherServer]:
    with serving(model) as server:
        yield server


def rows(cache: Cache) -> dict[str, Any]:
    """Return every row of a cache."""
    pairs = [(domain, split) for domain in cache.domains for split in ("train", "validation")]
    read = [cache.read(*pair, cache.row_numbers(*pair)) for pair in pairs]
    return {
        "ids": np.concatenate([r.targets.ids.reshape(-1, r.targets.ids.shape[-1]) for r in read]),
        "tail": np.concatenate([r.targets.tail.ravel() for r in read]),
        "label": np.concatenate([r.label_logprob.ravel() for r in read]),
    }


@pytest.mark.parametrize("targets", ["topk:8", "sampled:8"])
def test_hidden_states_give_the_cache_of_the_local_teacher(
    server: TeacherServer,
    model: Path,
    make_cache: Make,
    words: Any,
    tmp_path: Path,
    targets: str,
) -> None:
    spec = TargetSpec.parse(targets)
    teacher = load_served(server.url, words, head=model, targets=spec)
    local = make_cache(tmp_path / "l", teacher=load_teacher(str(model)), targets=targets)
    cache = make_cache(tmp_path / "s", teacher=teacher, targets=targets, batch_rows=None)
    assert cache.spec.teacher == {
        "class": "served",
        "engine": "tests",
        "model": "tiny",
        "answers": "hidden states",
        "head": extract_head(model).hash(),
    }
    mine, theirs = rows(cache), rows(local)
    assert (mine["ids"] == theirs["ids"]).mean() > 0.999
    np.testing.assert_allclose(mine["label"], theirs["label"], atol=1e-3)
    lost, expected = (describe(c)["domains"]["letters"]["seen"]["fidelity"] for c in (cache, local))
    assert lost == pytest.approx(expected, rel=1e-2)


def test_log_probabilities_give_the_topk_of_the_local_teacher(
    server: TeacherServer,
    model: Path,
    make_cache: Make,
    words: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    local = make_cache(tmp_path / "local", teacher=load_teacher(str(model)))
    teacher = load_served(server.url, words, targets=TOP8)
    cache = make_cache(tmp_path / "served", teacher=teacher)
    assert cache.spec.vocab_size == 300
    mine, theirs = rows(cache), rows(local)
    assert (mine["ids"] == theirs["ids"]).mean() > 0.999
    np.testing.assert_allclose(mine["label"], theirs["label"], atol=1e-3)
    np.testing.assert_allclose(mine["tail"], theirs["tail"], atol=1e-3)
    facts = describe(cache)
    assert facts["domains"]["letters"]["seen"]["fidelity"] == {}
    show(facts)
    assert "tiny at http://127.0.0.1" in capsys.readouterr().out


@pytest.mark.parametrize("targets", ["topk:8", "sampled:8"])
def test_targets_of_given_hidden_states_are_exact(
    server: TeacherServer,
    model: Path,
    words: Any,
    targets: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, head = TargetSpec.parse(targets), extract_head(model).to(torch.device("cpu"))
    temperatures = (2.0,) if spec.kind == "topk" else ()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(257, (5, 17), generator=generator)
    offsets = torch.rand(5, 16, dtype=torch.float64, generator=generator)
    chosen = torch.tensor([0, 3, 15, 7, 8])
    hidden = torch.stack([server.hidden(row) for row in tokens[:, :-1].tolist()])
    logits = torch.stack([head.logits(row) for row in hidden])
    expected = extract(logits, tokens[:, 1:], spec, temperatures=temperatures, offsets_BS=offsets)
    teacher = load_served(server.url, words, head=model, targets=spec)
    call = Call(tokens, chosen, spec, temperatures, offsets)
    scores, full = teacher.scores(call)
    for got, wanted in zip(scores, expected, strict=True):
        assert torch.equal(got, wanted)
    assert full is not None
    torch.testing.assert_close(full, logits[torch.arange(5), chosen])
    torch.testing.assert_close(teacher.logits(tokens[:, :-1]), logits)
    # In chunks of five positions only the last bits may differ.
    monkeypatch.setattr(targets_module, "HEAD_POSITIONS", 5)
    monkeypatch.setitem(targets_module.HEAD_BYTES, "cpu", 0)
    chunked, _ = teacher.scores(call)
    assert torch.equal(chunked.ids, expected.ids)
    torch.testing.assert_close(chunked.label_logprob, expected.label_logprob)


def test_hidden_states_may_be_sent_as_bfloat16(
    server: TeacherServer, model: Path, words: Any
) -> None:
    teacher = load_served(server.url, words, head=model, targets=TOP8, dtype="bfloat16")
    assert teacher.identity["dtype"] == "bfloat16"
    assert isinstance(teacher, HiddenTeacher)
    tokens = torch.arange(16)[None]
    (got,) = teacher.hidden(tokens)
    assert torch.equal(got, server.hidden(tokens[0].tolist()).bfloat16().float())


# --- a server that fails --------------------------------------------------------------------------


def start(model: Path, port: int, when: Path) -> subprocess.Popen[bytes]:
    """Start a server as a process, which listens as soon as a file is there."""
    words = map(str, (model, port, when))
    return subprocess.Popen([sys.executable, "-m", "tests.teacher_server", *words])


def test_a_build_waits_for_a_server_that_is_killed_and_comes_back(
    server: TeacherServer,
    model: Path,
    make_cache: Make,
    words: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    port, path = free_port(), tmp_path / "mix.zarr"
    first, second = (start(model, port, tmp_path / when) for when in ("first", "second"))

    def kill_and_replace() -> None:
        while not list(path.glob("commits/**/*.json")):
            time.sleep(0.01)
        first.kill()
        first.wait()
        time.sleep(1)
        (tmp_path / "second").touch()

    try:
        (tmp_path / "first").touch()
        teacher = load_when_up(f"http://127.0.0.1:{port}", words, model)
        killer = threading.Thread(target=kill_and_replace)
        killer.start()
        with caplog.at_level(logging.WARNING):
            make_cache(path, teacher=teacher)
        killer.join()
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    assert "does not answer" in caplog.text
    assert "the server answers again" in caplog.text
    quiet = load_served(server.url, words, head=model, targets=TOP8)
    make_cache(tmp_path / "quiet", teacher=quiet)
    one, other = tree(path), tree(tmp_path / "quiet")
    assert one.pop("zarr.json") != other.pop("zarr.json")  # which tells the address
    assert one == other


def load_when_up(url: str, words: Any, model: Path) -> Teacher:
    deadline = time.monotonic() + 120
    while True:
        try:
            return load_served(url, words, head=model, targets=TOP8)
        except InputError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_a_server_that_stays_away_ends_the_build_and_the_same_call_resumes(
    model: Path, make_cache: Make, words: Any, tmp_path: Path
) -> None:
    with serving(model) as server:
        teacher = load_served(server.url, words, head=model, targets=TOP8, patience=0.2)
        port = server.server_port
    with pytest.raises(CacheError, match=r"does not answer: .* for 0 s\. Start the server again"):
        make_cache(tmp_path / "mix.zarr", teacher=teacher)
    with serving(model, port=port):
        make_cache(tmp_path / "mix.zarr", teacher=teacher).require_finished()


def test_an_overloaded_server_is_asked_again(
    model: Path, make_cache: Make, words: Any, tmp_path: Path
) -> None:
    with serving(model) as server:
        teacher = load_served(server.url, words, targets=TOP8)
        server.failures = 3
        make_cache(tmp_path / "mix.zarr", teacher=teacher).require_finished()
        assert server.failures == 0


# --- what does not belong together ----------------------------------------------------------------


def test_the_head_of_another_model_is_refused(
    server: TeacherServer, model: Path, words: Any, tmp_path: Path
) -> None:
    right = extract_head(model)
    generator = torch.Generator().manual_seed(5)
    wrong = Head(right.weight[torch.randperm(300, generator=generator)])
    wrong.save(tmp_path / "wrong")
    with pytest.raises(InputError, match="this head and the server's own differ by"):
        load_served(server.url, words, head=tmp_path / "wrong", targets=TOP8)
    Head(right.weight[:, :16]).save(tmp_path / "narrow")
    with pytest.raises(InputError, match="got 32 values of hidden state per token, expected 16"):
        load_served(server.url, words, head=tmp_path / "narrow", targets=TOP8)


def test_a_head_that_is_worse_than_guessing_is_refused_without_log_probabilities(
    model: Path, words: Any, tmp_path: Path
) -> None:
    Head(extract_head(model).weight, scale=9.0).save(tmp_path / "wrong")
    with serving(model, calls=HIDDEN_ONLY) as server:
        load_served(server.url, words, head=model, targets=TOP8)
        with pytest.raises(InputError, match=r"where guessing gives 5\.7"):
            load_served(server.url, words, head=tmp_path / "wrong", targets=TOP8)


def test_normalized_or_random_hidden_states_are_refused(model: Path, words: Any) -> None:
    with (
        serving(model, normalize=True) as server,
        pytest.raises(InputError, match="use_activation false"),
    ):
        load_served(server.url, words, head=model, targets=TOP8)
    with (
        serving(model, noise=1.0) as server,
        pytest.raises(InputError, match="two answers to one prompt differ"),
    ):
        load_served(server.url, words, head=model, targets=TOP8)


def test_more_log_probabilities_than_the_server_allows_are_refused(
    server: TeacherServer, words: Any
) -> None:
    with pytest.raises(InputError, match=r"max allowed: 20 \(asked for 21 .*--max-logprobs"):
        load_served(server.url, words, targets=TargetSpec.parse("topk:21"))
    load_served(server.url, words, targets=TargetSpec.parse("topk:20"))


def test_ids_beyond_the_tokenizer_are_refused_where_no_configuration_tells_of_them(
    server: TeacherServer, make_cache: Make, tokenizer: Any, tmp_path: Path
) -> None:
    teacher = load_served(server.url, tokenizer, targets=TOP8)
    assert teacher.vocab_size == 257
    with pytest.raises(InputError, match=r"got token id \d+, expected ids below 257"):
        make_cache(tmp_path / "mix.zarr", teacher=teacher)


def test_log_probabilities_are_refused_for_what_they_cannot_give(
    server: TeacherServer, make_cache: Make, words: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="got sampled:16, expected topk:K"):
        load_served(server.url, words, targets=TargetSpec.parse("sampled:16"))
    teacher = load_served(server.url, words, targets=TOP8)
    with pytest.raises(InputError, match="with temperatures"):
        make_cache(tmp_path / "mix.zarr", teacher=teacher, temperatures=[2.0], batch_rows=None)
    assert not (tmp_path / "mix.zarr" / "zarr.json").exists()


def test_a_call_that_the_server_does_not_have_is_named(model: Path, words: Any) -> None:
    with (
        serving(model, calls=LOGPROBS_ONLY) as server,
        pytest.raises(InputError, match=r"does not return hidden states .*--runner pooling"),
    ):
        load_served(server.url, words, head=model, targets=TOP8)
    with (
        serving(model, calls=HIDDEN_ONLY) as server,
        pytest.raises(InputError, match=r"does not return log-probabilities .*Give --head"),
    ):
        load_served(server.url, words, targets=TOP8)


def test_wrong_names_addresses_and_tokenizers_are_refused(
    server: TeacherServer, model: Path, words: Any
) -> None:
    with pytest.raises(InputError, match=r"unknown model 'tinny'\. Did you mean 'tiny'"):
        load_served(server.url, words, model="tinny", targets=TOP8)
    with pytest.raises(InputError, match=r"does not answer: .*refused.* Start the server"):
        load_served(f"http://127.0.0.1:{free_port()}", words, targets=TOP8)
    with pytest.raises(InputError, match="is not an address"):
        load_served("http://", words, targets=TOP8)
    with pytest.raises(InputError, match="unknown dtype 'int4'"):
        load_served(server.url, words, dtype="int4", targets=TOP8)
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(model)
    other.add_tokens(["The river"])
    with pytest.raises(InputError, match="gives other ids"):
        load_served(server.url, other, targets=TOP8)


# --- the command line -----------------------------------------------------------------------------


def test_commands_build_a_cache_with_a_head_file(
    server: TeacherServer, model: Path, corpus: Path, tmp_path: Path
) -> None:
    head, cache = tmp_path / "head.safetensors", tmp_path / "mix.zarr"
    made = run("head", model, head)
    assert made.exit_code == 0, made.output
    assert "300 × 32" in made.output
    words = ("build", corpus, cache, "--teacher", server.url, "--seq-len", "16", "--head", head)
    refused = run(*words)
    assert refused.exit_code == 2
    assert "give the --tokenizer" in refused.output
    built = run(*words, "--tokenizer", model)
    assert built.exit_code == 0, built.output
    assert "is finished" in built.output
    checked = run("verify", cache, "--teacher", server.url, "--head", head, "--rows", "4")
    assert checked.exit_code == 0, checked.output
    assert "teacher on 4 rows" in checked.output
    refused = run("build", corpus, tmp_path / "other", "--teacher", model, "--model", "tiny")
    assert refused.exit_code == 2
    assert "are for a --teacher that is" in refused.output


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)], prog_name="ddk-cache")


@pytest.mark.parametrize("head", [True, False])
def test_each_document_of_a_row_is_a_prompt(
    server: TeacherServer, model: Path, make_cache: Make, words: Any, tmp_path: Path, head: bool
) -> None:
    given: dict[str, Any] = {"head": model} if head else {}
    teacher = load_served(server.url, words, targets=TOP8, **given)
    settings: dict[str, Any] = {"packing": "documents", "seq_len": 60, "batch_rows": None}
    local = make_cache(tmp_path / "local", teacher=load_teacher(str(model)), **settings)
    cache = make_cache(tmp_path / "served", teacher=teacher, **settings)
    mine, theirs = rows(cache), rows(local)
    assert (mine["ids"] == theirs["ids"]).mean() > 0.999
    np.testing.assert_allclose(mine["label"], theirs["label"], atol=1e-3)
    np.testing.assert_allclose(mine["tail"], theirs["tail"], atol=1e-3)
