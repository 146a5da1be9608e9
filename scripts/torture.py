"""Torture a cache: kill its builders, flip its bits, fill its disk, lie in its documents.

    torture.py kills | bits | disk | lies | fuzz | speed | all

Everything runs on a tiny corpus with a callable teacher, so that thousands of blows take minutes;
the price is that sizes at which a real disk or a real teacher behaves otherwise are not met. Each
command draws from its seed, prints one table, and exits 1 if anything is wrong. Only `kills` is
not repeatable to the letter: when a signal arrives is up to the machine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from types import FrameType
from typing import Any

import click
import google_crc32c
import numpy as np
import xxhash
from rich.console import Console
from rich.table import Table

from ddk_cache.audit import MASS_BINS
from ddk_cache.console import Commands
from ddk_cache.files import PARTIAL
from ddk_cache.info import describe
from ddk_cache.manifest import Root, create_root, dump, write_plan
from ddk_cache.objects import Folder
from ddk_cache.reader import Cache, open_cache
from ddk_cache.schema import (
    SPLITS,
    CacheSpec,
    DDKError,
    DomainPlan,
    Portion,
    ShardKey,
    TargetSpec,
    canonical,
    digest,
)
from ddk_cache.store import TOKEN_ARRAYS, Store
from ddk_cache.verify import THREADS, verify

VOCAB = 300
END = "<|endoftext|>"
SETTINGS: dict[str, Any] = {
    "seq_len": 16,
    "target_spec": "topk:8",
    "holdout": 0.3,
    "batch_rows": 4,
    "chunk_rows": 2,
    "shard_rows": 8,
}
"""Several shards and a ragged last one from a few kilobytes."""

PATIENCE = 120.0
"""Seconds after which a builder counts as stuck."""

MEMORY = 4 * 2**30
"""Bytes of address space of a process that reads a damaged cache."""

TIME = 10
"""Seconds for looking at a damaged cache."""

GROWTH = 200 * 2**20
"""Bytes by which it may grow."""

Pair = tuple[str, str]
Chance = random.Random


# --- a command and its report ---------------------------------------------------------------------


@dataclass
class Report:
    """What was done and found."""

    figures: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


Measure = Callable[..., Report]
MEASURES: dict[str, Measure] = {}


@click.group(cls=Commands, context_settings={"show_default": True})
def main() -> None:
    """Torture a cache, and say whether it bore it."""


def general(command: Any) -> Any:
    """Give a command the options that all have."""
    command = click.option("--json", "file", type=click.Path(path_type=Path))(command)
    return click.option("--seed", type=int, default=0)(command)


def measurement(measure: Measure) -> Measure:
    """Make a command of a function (work folder, seed, sizes) → Report."""
    name = measure.__name__

    @wraps(measure)
    def command(seed: int, file: Path | None, **sizes: Any) -> None:
        conclude({name: perform(measure, seed, sizes)}, file)

    MEASURES[name] = measure
    main.command(name)(general(command))
    return measure


def perform(measure: Measure, seed: int, sizes: Mapping[str, Any]) -> Report:
    """Run one measurement in a folder of its own and show what came of it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        report = measure(Path(work), seed, **sizes)
    report.figures["seconds"] = round(time.monotonic() - began, 1)
    table = Table(measure.__name__, "", box=None, pad_edge=False)
    for name, figure in report.figures.items():
        table.add_row(name, str(figure))
    Console().print(table)
    for line in report.wrong[:40]:
        click.echo(f"WRONG  {line}")
    click.echo(f"{len(report.wrong)} things are wrong\n")
    return report


def conclude(reports: Mapping[str, Report], file: Path | None) -> None:
    """Write the figures, and exit by them."""
    if file:
        file.write_text(json.dumps({name: vars(r) for name, r in reports.items()}, indent=1))
    sys.exit(any(report.wrong for report in reports.values()))


@main.command("all")
@general
def everything(seed: int, file: Path | None) -> None:
    """Run every measurement at its full size."""
    reports = {}
    for name, measure in MEASURES.items():
        options = main.commands[name].params
        sizes = {str(o.name): o.default for o in options if o.name not in ("seed", "file")}
        reports[name] = perform(measure, seed, sizes)
    conclude(reports, file)


# --- material -------------------------------------------------------------------------------------


def make_corpus(folder: Path, documents: int, seed: int = 0) -> Path:
    """Write three domains of so many short documents each."""
    chance = Chance(seed)
    folder.mkdir(parents=True)
    for name, letters in (("letters", "abcde "), ("digits", "0123456789"), ("notes", "xyz ,.")):
        texts = ["".join(chance.choices(letters, k=45)) for _ in range(documents)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def byte_tokenizer() -> Any:
    """Return a tokenizer whose tokens are the 256 bytes and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {END: 0} | {letter: index + 1 for index, letter in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=END, eos_token=END)


def build_cache(corpus: Path, cache: Path, delay: float, ready: Callable[[], Any]) -> None:
    """Build with a teacher that is a function of two matrices and takes its time."""
    import torch

    from ddk_cache.build import build
    from ddk_cache.corpus import find_sources
    from ddk_cache.teacher import Teacher

    generator = torch.Generator().manual_seed(0)
    into = torch.randn(VOCAB, 12, generator=generator)
    out = torch.randn(12, VOCAB, generator=generator)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        time.sleep(delay)
        return into[tokens] @ out

    tokenizer, teacher = byte_tokenizer(), Teacher(logits, VOCAB, {"class": "matrices"})
    ready()
    build(cache, find_sources(corpus), teacher, tokenizer, **SETTINGS)


@main.command(hidden=True)
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--delay", type=float, default=0.0)
def worker(corpus: Path, cache: Path, delay: float) -> None:
    """Build CACHE: say that the imports are done, and begin at the next line of stdin."""

    def ready() -> None:
        click.echo("ready")
        sys.stdin.readline()

    build_cache(corpus, cache, delay, ready)


def start_worker(corpus: Path, cache: Path, delay: float = 0.0) -> subprocess.Popen[str]:
    """Start a builder, which waits."""
    return subprocess.Popen(
        [sys.executable, __file__, "worker", str(corpus), str(cache), f"--delay={delay}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def run_worker(corpus: Path, cache: Path) -> tuple[int, str]:
    """Build in a process of its own; return its exit code and what it said."""
    process = start_worker(corpus, cache)
    _, err = process.communicate("\n", PATIENCE)
    return process.returncode, err


def make_cache(work: Path, documents: int, seed: int = 0) -> Path:
    """Build a cache of a corpus of its own."""
    corpus = make_corpus(work / f"corpus{seed}", documents, seed)
    code, err = run_worker(corpus, work / f"mix{seed}.zarr")
    if code:
        raise DDKError(f"the cache to torture could not be built: {err}")
    return work / f"mix{seed}.zarr"


def tree(root: Path) -> dict[str, str]:
    """Return everything below a directory, with a hash of what is in it."""
    return {
        str(path.relative_to(root)): digest(path.read_bytes()) if path.is_file() else "folder"
        for path in root.rglob("*")
    }


def differences(root: Path, right: Mapping[str, str]) -> list[str]:
    """Return in what a tree differs from what it has to be."""
    found = tree(root)
    return [
        f"{name} is {'different' if name in found and name in right else 'missing or left over'}"
        for name in sorted({*found, *right})
        if found.get(name) != right.get(name)
    ]


# --- looking at a cache that may be damaged -------------------------------------------------------


class StuckError(BaseException):
    """Something took too long; no handler of ordinary errors may swallow it."""


@dataclass
class Look:
    """What the library says of a cache."""

    said: list[tuple[str, str, str]] = field(default_factory=list)
    """Stage, class of the error, message."""
    wrong: list[str] = field(default_factory=list)
    """Rows that were given and are not the right ones."""
    other: list[str] = field(default_factory=list)
    """Exceptions that are no DDKError."""

    def attempt(self, stage: str, step: Callable[[], Any]) -> Any:
        """Return what a step gives; None if it fails."""
        try:
            return step()
        except DDKError as error:
            self.said.append((stage, type(error).__name__, str(error)))
        except Exception as error:
            self.other.append(f"{stage}: {type(error).__name__}: {str(error)[:200]}")
        return None

    def found(self, *stages: str) -> bool:
        """Return whether one of these stages said anything."""
        return any(stage in stages for stage, _, _ in self.said)


def look(root: Path, truth: Mapping[Pair, str]) -> Look:
    """Open, describe, verify and read a cache; whatever happens, in good time."""
    seen = Look()
    signal.signal(signal.SIGALRM, stuck)
    signal.alarm(TIME)
    try:
        look_into(seen, root, truth)
    except StuckError:
        seen.other.append(f"it took more than {TIME} s")
    finally:
        signal.alarm(0)
    return seen


def look_into(seen: Look, root: Path, truth: Mapping[Pair, str]) -> None:
    """Note what each stage says."""
    cache = seen.attempt("open", lambda: open_cache(root, unfinished=True))
    if cache is None:
        return
    seen.attempt("info", lambda: describe(cache))
    for problem in seen.attempt("verify", lambda: verify(cache, lambda _: None)) or []:
        seen.said.append(("verify", "Problem", problem.text))
    for pair, right in truth.items():
        rows = seen.attempt("read", partial(rows_hash, cache, *pair))
        if rows not in (None, right):
            seen.wrong.append("/".join(pair))


def rows_hash(cache: Cache, domain: str, split: str) -> str:
    """Read all rows of a split; return a hash of their values."""
    rows = cache.read(domain, split, cache.row_numbers(domain, split))
    parts = (rows.tokens, rows.label_logprob, rows.loss_mask, *vars(rows.targets).values())
    return digest(b"".join(part.tobytes() for part in parts))


def truth_of(root: Path) -> dict[Pair, str]:
    """Return the hash of the rows of each split."""
    cache = open_cache(root)
    return {(d, s): rows_hash(cache, d, s) for d in cache.domains for s in SPLITS}


def kind_of(path: Path, root: Path) -> str:
    """Return what a file of a cache is."""
    first, *rest = path.relative_to(root).parts
    if first == "domains":
        return "Zarr document" if path.name == "zarr.json" else "shard object"
    known = {"commits": "record", "plans": "plan", "tokenizer": "tokenizer file"}
    return known[first] if rest else "root"


def files_of(root: Path) -> list[Path]:
    """Return every file of a cache, in order."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """Call a function in a fresh process of limited memory; None if it dies of it."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context, initializer=limit) as pool:
        try:
            return pool.submit(function, *given).result()
        except BrokenProcessPool:
            return None


def limit() -> None:
    """Limit the address space of this process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def stuck(number: int, frame: FrameType | None) -> None:
    """Stop what takes too long."""
    raise StuckError


# --- kills ----------------------------------------------------------------------------------------


class Workers:
    """Builders of one cache: those at work, and spares that have their imports behind them."""

    def __init__(self, corpus: Path, cache: Path, delay: float, spares: int) -> None:
        self.start = partial(start_worker, corpus, cache, delay)
        self.spares = deque(self.start() for _ in range(spares))
        self.busy: list[subprocess.Popen[str]] = []

    def fill(self, count: int) -> None:
        """Put so many more to work."""
        for _ in range(count):
            process = self.spares.popleft()
            self.spares.append(self.start())
            assert process.stdout
            assert process.stdin
            process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
            self.busy.append(process)

    def retire(self, victims: Iterable[subprocess.Popen[str]], wrong: list[str]) -> int:
        """Wait for workers that end; return how many were killed."""
        killed = 0
        for process in list(victims):
            try:
                _, err = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                _, err = process.communicate()
                wrong.append("a builder got stuck")
            self.busy.remove(process)
            killed += process.returncode == -signal.SIGKILL
            if process.returncode not in (0, -signal.SIGKILL):
                wrong.append(f"a builder exited with {process.returncode}: {err.strip()[-300:]}")
        return killed

    def close(self) -> None:
        """End all of them."""
        for process in (*self.busy, *self.spares):
            process.kill()
            process.communicate()


def committed_files(root: Path) -> dict[str, str]:
    """Return every record, and every object of its shard, with its hash."""
    found = {}
    for record in sorted(root.glob("commits/*/*/*.json")):
        domain, split = record.parts[-3:-1]
        objects = root.joinpath("domains", domain, split).glob(f"*/c/{record.stem}/**/*")
        for path in (record, *objects):
            if path.is_file():
                found[str(path)] = digest(path.read_bytes())
    return found


def phase(root: Path) -> str:
    """Return how far a build is: the furthest that any uncommitted shard has come."""
    if not (root / "zarr.json").exists():
        return "opening"
    if len(list(root.glob("plans/*.json"))) < 3:
        return "planning"
    if list(root.glob(f"commits/**/*{PARTIAL}")):
        return "committing"
    written: Counter[tuple[str, ...]] = Counter()
    for path in root.glob("domains/*/*/*/c/*"):
        _, domain, split, name, _, number = path.relative_to(root).parts
        record = root / "commits" / domain / split / f"{number}.json"
        if name not in TOKEN_ARRAYS and not record.exists():
            written[domain, split, number] += 1
    return {0: "scoring", 4: "committing"}.get(max(written.values(), default=0), "writing")


@measurement
@click.option("--kills", default=100)
@click.option("--workers", multiple=True, default=(1, 3))
def kills(work: Path, seed: int, kills: int, workers: tuple[int, ...]) -> Report:
    """Kill builders at random moments; nothing committed may go, and the end is the same bytes."""
    report, chance, made = Report(), Chance(seed), 0
    right = tree(make_cache(work, documents=20))
    cache, tally = work / "siege.zarr", Counter[str]()
    builders = Workers(work / "corpus0", cache, 0.01, max(workers))
    try:
        while tally["kills"] < kills:
            count = workers[made % len(workers)]
            siege(builders, cache, count, chance, kills, tally, report.wrong)
            report.wrong += differences(cache, right)
            shutil.rmtree(cache)
            made += 1
    finally:
        builders.close()
    lost = sum("is lost" in line for line in report.wrong)
    changed = sum("has changed" in line for line in report.wrong)
    leftover = sum("left over" in line for line in report.wrong)
    report.figures = {"caches finished": made, **dict(sorted(tally.items()))}
    report.figures |= {"files lost": lost, "files changed": changed, "leftovers": leftover}
    return report


def siege(
    builders: Workers,
    cache: Path,
    count: int,
    chance: Chance,
    kills: int,
    tally: Counter[str],
    wrong: list[str],
) -> None:
    """Build one cache, killing builders until it is finished or enough were killed."""
    builders.fill(count)
    seen: dict[str, str] = {}
    while True:
        time.sleep(chance.uniform(0, 4))
        builders.retire([b for b in builders.busy if b.poll() is not None], wrong)
        if not builders.busy or tally["kills"] >= kills:
            break
        seen |= compare_committed(seen, committed_files(cache), wrong)
        victims = [chance.choice(builders.busy)] if chance.random() < 0.8 else [*builders.busy]
        for victim in victims:
            victim.kill()
        killed = builders.retire(victims, wrong)
        tally["kills"] += killed
        tally[f"kills of {count} at work"] += killed
        tally[f"kills while {phase(cache)}"] += killed
        compare_committed(seen, committed_files(cache), wrong)
        builders.fill(killed)
    builders.retire(builders.busy, wrong)
    compare_committed(seen, committed_files(cache), wrong)


def compare_committed(
    seen: Mapping[str, str], now: dict[str, str], wrong: list[str]
) -> dict[str, str]:
    """Note what of the committed is gone or changed; return what there is now."""
    wrong += [f"{name} is lost" for name in seen.keys() - now.keys()]
    wrong += [f"{name} has changed" for name in seen.keys() & now.keys() if seen[name] != now[name]]
    return now


# --- bits -----------------------------------------------------------------------------------------


@measurement
@click.option("--flips", default=1000)
def bits(work: Path, seed: int, flips: int) -> Report:
    """Flip single bits of every kind of file; each has to be found, and none may be read."""
    report, chance = Report(), Chance(seed)
    root = make_cache(work, documents=8)
    truth, paths = truth_of(root), files_of(root)
    sizes = [path.stat().st_size for path in paths]
    done: Counter[str] = Counter()
    for number in range(flips):
        path = chance.choice(paths) if number % 2 else chance.choices(paths, sizes)[0]
        whole = path.read_bytes()
        place = chance.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        seen = look(root, truth)
        path.write_bytes(whole)
        done[kind_of(path, root)] += 1
        what = f"bit {place} of {path.relative_to(root)}"
        found = seen.found("open", "verify")
        report.wrong += [] if found else [f"{what} was not found"]
        report.wrong += [f"{what}: wrong rows of {pair}" for pair in seen.wrong]
        report.wrong += [f"{what}: {error}" for error in seen.other]
    report.figures = {"flips": flips, **{f"of a {kind}": n for kind, n in sorted(done.items())}}
    missed = sum("was not found" in line for line in report.wrong)
    silent = sum("wrong rows" in line for line in report.wrong)
    report.figures |= {"found": flips - missed, "silently wrong": silent}
    report.figures["other exceptions"] = len(report.wrong) - missed - silent
    return report


# --- disk -----------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small disk; False where that is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "torture", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def space(folder: Path) -> tuple[int, int]:
    """Return the used and the free bytes of a disk."""
    usage = shutil.disk_usage(folder)
    return usage.used, usage.free


@measurement
@click.option("--moments", default=10)
def disk(work: Path, seed: int, moments: int) -> Report:
    """Let the disk run full at different moments; one message, and the same command goes on."""
    report, chance = Report(), Chance(seed)
    corpus = make_corpus(work / "corpus", 12)
    with small_disk(work / "disk") as mounted:
        if not mounted:
            return Report({"skipped": "mounting a tmpfs is not permitted here"})
        run_worker(corpus, work / "disk" / "mix.zarr")
        right, needed = tree(work / "disk" / "mix.zarr"), space(work / "disk")[0]
    phases: Counter[str] = Counter()
    for moment in range(moments):
        room = int((moment + chance.random()) / moments * needed)
        with small_disk(work / "disk"):
            wrong, where = fill_up(corpus, work / "disk", room, right)
        phases[f"full while {where}"] += 1
        report.wrong += [f"with {room:,} of {needed:,} bytes: {line}" for line in wrong]
    report.figures = {"moments": moments, "bytes needed": needed, **phases}
    return report


def fill_up(
    corpus: Path, folder: Path, room: int, right: Mapping[str, str]
) -> tuple[list[str], str]:
    """Build where there is too little room, then make room; return what is wrong, and the phase."""
    filler, cache, wrong = folder / "filler", folder / "mix.zarr", []
    filler.write_bytes(bytes(space(folder)[1] - room))
    code, err = run_worker(corpus, cache)
    where = phase(cache)
    errors = [line for line in err.splitlines() if line.startswith("Error:")]
    if code != 1 or len(errors) != 1 or "Traceback" in err or "No space left" not in errors[0]:
        wrong.append(f"exit code {code}, said {err[-1000:]!r}")
    filler.unlink()
    code, err = run_worker(corpus, cache)
    if code:
        wrong.append(f"with room again: exit code {code}, said {err[-1000:]!r}")
    return [*wrong, *differences(cache, right)], where


# --- lies -----------------------------------------------------------------------------------------


Tell = Callable[[Path, Path], Any]
"""What changes a cache, with another cache of the same spec at hand."""

Lie = tuple[str, str, Tell]
"""What it is, what the refusal has to name, and how it is told."""


def exchange(one: Path, other: Path) -> None:
    """Give each of two files the bytes of the other."""
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a sealed document, and give it the seal that it then has to have."""
    whole = json.loads(path.read_bytes())
    body = whole["attributes"]["ddk"] if "attributes" in whole else whole
    body.pop("format_version", None)
    body.pop("seal", None)
    change(body)
    data = dump(body)
    if body is not whole:
        whole["attributes"]["ddk"] = json.loads(data)
        data = json.dumps(whole, indent=1).encode()
    path.write_bytes(data)


def edit_array(array: str, key: str, value: Any, root: Path, _: Path) -> None:
    """Change the Zarr document of an array."""
    body = json.loads((root / array).read_bytes())
    (root / array).write_text(json.dumps(body | {key: value}, indent=2))


def edit_rows(rows: int, root: Path, _: Path) -> None:
    """Change the rows of a plan."""
    edit(root / "plans/digits.json", lambda b: b["portions"][0]["rows"].update(train=rows))


def forge(name: str, value: Any, everywhere: bool, root: Path, _: Path) -> None:
    """Change the spec under a right seal; `everywhere`: with the fingerprint in all documents."""
    spec = json.loads((root / "zarr.json").read_bytes())["attributes"]["ddk"]["spec"]
    spec[name] = value
    mark = digest(canonical(spec))
    edit(root / "zarr.json", lambda body: body.update(spec=spec, fingerprint=mark))
    documents = [*root.glob("plans/*.json"), *root.glob("commits/*/*/*.json")]
    for path in documents if everywhere else []:
        edit(path, lambda body: body.update(fingerprint=mark))


def escape(root: Path, _: Path) -> None:
    """Name a domain so that its plan and its arrays lie elsewhere."""
    edit(root / "zarr.json", lambda body: body["sources"].update({"../x": {}}))
    edit(root / "plans" / "digits.json", lambda body: body.update(domain="../x"))
    (root / "plans" / "digits.json").rename(root / "x.json")


def lead_out(root: Path, path: Path) -> None:
    """Put a link to the same bytes outside of the cache in the place of a file or folder."""
    outside = root.with_suffix(".outside")
    path.rename(outside)
    path.symlink_to(outside)


def reorder(path: Path) -> None:
    """Exchange two chunks of a shard in its index, under a right checksum."""
    data, size = path.read_bytes(), 16 * 4
    index = np.frombuffer(data[-size - 4 : -4], "<u8").reshape(4, 2)[[1, 0, 2, 3]].tobytes()
    check = google_crc32c.value(index).to_bytes(4, "little")
    path.write_bytes(data[: -size - 4] + index + check)


ABSURD: dict[str, list[Any]] = {
    "seq_len": [2**40, 2**24, 2**20, 15, 0, -1, 16.0, "16", [[16]], None, True],
    "vocab_size": [2**60, 2**31 - 1, -300],
    "chunk_rows": [2**40, 2**20, 8, 1],
    "shard_rows": [2**40, 2**24, 16, 2],
    "targets": ["topk:1", "topk:300", "topk:99999999999999999999", 8],
    "logprob_step": [-1.0, 10**400, "x"],
    "holdout": [-1, 7.0, {}],
    "teacher": [[], 3, {"class": [1]}],
}
"""Values of the spec; most are refused for themselves, the others for what is on disk."""


def lies_about_array(name: str) -> Iterator[Lie]:
    """Yield lies told by shards of an array that are gone, changed, exchanged, or elsewhere."""

    def file(root: Path, domain: str = "digits", number: int = 0) -> Path:
        folder = root / "domains" / domain / "train" / name / "c" / str(number)
        return next(path for path in files_of(folder))

    yield f"deleted {name}", name, lambda a, _: file(a).unlink()
    yield f"empty {name}", name, lambda a, _: file(a).write_bytes(b"")
    yield f"truncated {name}", name, lambda a, _: os.truncate(file(a), 99)
    yield f"two {name}", name, lambda a, _: exchange(file(a), file(a, number=1))
    yield f"another domain's {name}", name, lambda a, _: exchange(file(a), file(a, "letters"))
    yield f"another cache's {name}", name, lambda a, b: exchange(file(a), file(b))
    yield f"linked {name}", name, lambda a, _: lead_out(a, file(a))
    yield f"exchanged chunks of {name}", name, lambda a, _: reorder(file(a))


def lies_about_documents() -> Iterator[Lie]:
    """Yield lies told by documents that are not where they belong."""
    record, plan = "commits/digits/train/0.json", "plans/digits.json"
    other = record.replace("0", "1")
    yield "another cache's record", record, lambda a, b: exchange(a / record, b / record)
    yield "exchanged records", "commits", lambda a, _: exchange(a / record, a / other)
    yield "another cache's plan", "digits", lambda a, b: exchange(a / plan, b / plan)
    yield "domain ../x", "zarr.json", escape
    yield "linked domain", "digits", lambda a, _: lead_out(a, a / "domains/digits")
    yield "linked split", "digits", lambda a, _: lead_out(a, a / "domains/digits/train")


def lies_about_numbers() -> Iterator[Lie]:
    """Yield lies told by numbers in documents, under a right seal where there is one."""
    array = "domains/digits/train/tokens/zarr.json"
    for key, value in (("shape", [2**62, 17]), ("shape", [-1]), ("data_type", "float64")):
        yield f"array's {key} {value}", array, partial(edit_array, array, key, value)
    for rows in (0, 1, 2**40, 2**62, -5):
        yield f"{rows} rows", "digits", partial(edit_rows, rows)
    for name, values in ABSURD.items():
        for value in values:
            what = f"{name} {str(value)[:20]}"
            yield f"{what} in the root", "", partial(forge, name, value, False)
            yield f"{what} everywhere", "", partial(forge, name, value, True)


def inspect(root: Path, truth: Mapping[Pair, str]) -> tuple[Look, int]:
    """Look at a cache; return also by how many bytes this process grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = look(root, truth)
    return seen, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@measurement
def lies(work: Path, seed: int) -> Report:
    """Tell a cache lies; each has to be refused by name, cheaply, and none may be read."""
    report, refused, most = Report(), Counter[str](), 0
    one, other = make_cache(work, documents=12), make_cache(work, documents=12, seed=1)
    truth, told = truth_of(one), [*lies_about_documents(), *lies_about_numbers()]
    for name in ("tokens", "target_ids", "tail_logprob"):
        told += lies_about_array(name)
    for number, (lie, names, tell) in enumerate(told):
        a, b = work / f"{number}" / "a.zarr", work / f"{number}" / "b.zarr"
        shutil.copytree(one, a)
        shutil.copytree(other, b)
        tell(a, b)
        seen, growth = apart(inspect, a, truth) or (Look(other=["the process died"]), 0)
        shutil.rmtree(a.parent)
        refused["+".join(sorted({stage for stage, _, _ in seen.said}))] += 1
        report.wrong += [
            f"{lie}: {line}" for line in dict.fromkeys(complaints(names, seen, growth))
        ]
        most = max(most, growth)
    report.figures = {"lies": len(told), "largest growth, MiB": most >> 20}
    report.figures |= {f"refused by {stages}": n for stages, n in sorted(refused.items())}
    return report


def complaints(names: str, seen: Look, growth: int) -> Iterator[str]:
    """Yield what is wrong with how a lie was met."""
    if not seen.found("open", "verify", "read"):
        yield "was believed"
    if not all(names in message for _, _, message in seen.said):
        yield f"{names} is not named: {seen.said[0]}"
    if growth > GROWTH:
        yield f"cost {growth >> 20} MiB"
    yield from (f"wrong rows of {pair}" for pair in seen.wrong)
    yield from seen.other


# --- fuzz -----------------------------------------------------------------------------------------

DEEP = "deep"
NUMBERS: tuple[Any, ...] = (10**400, -(10**30), 2**63, 2**40, -1, 0, 1, 0.5, 1e308, True)
VALUES = (*NUMBERS, "", "x", "\ud800", None, [], {}, [[]], float("nan"), float("inf"), DEEP)


def mutate_bytes(data: bytes, chance: Chance) -> tuple[str, bytes]:
    """Return a mutation of bytes, and what was done."""
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    noise = chance.randbytes(chance.randint(1, 8))
    how = {
        "edit": data[:a] + noise + data[a + len(noise) :],
        "insert": data[:a] + noise + data[a:],
        "delete": data[:a] + data[b:],
        "truncate": data[:a],
        "duplicate": data[:b] + data[a:b] + data[b:],
        "digit": data[:a] + b"%d" % chance.randrange(10) + data[a + 1 :],
    }
    name = chance.choice(sorted(how))
    return f"{name} at {a}, {b}", how[name]


def mutate_value(body: Any, chance: Chance) -> str:
    """Replace a random value of a document in place; return what was done."""
    path: list[Any] = []
    while isinstance(body, dict | list) and body:
        key = chance.choice(sorted(body)) if isinstance(body, dict) else chance.randrange(len(body))
        path.append(key)
        if not (isinstance(body[key], dict | list) and body[key]) or chance.random() < 0.2:
            body[key] = chance.choice(VALUES)
            return f"{path} = {str(body[key])[:30]!r}"
        body = body[key]
    return "nothing"


def mutate(path: Path, chance: Chance) -> str:
    """Mutate a document on disk; return what was done."""
    if chance.random() < 0.4:
        what, data = mutate_bytes(path.read_bytes(), chance)
        path.write_bytes(data)
        return what
    if chance.random() < 0.6 and '"seal"' in path.read_text():
        done: list[str] = []
        try:
            edit(path, lambda body: done.append(mutate_value(body, chance)))
        except ValueError:  # no seal can be made of it
            return "nothing"
        return f"sealed {done[0]}"
    body = json.loads(path.read_bytes())
    what = mutate_value(body, chance)
    deep = "[" * 10_000 + "]" * 10_000
    path.write_text(json.dumps(body, indent=1).replace(f'"{DEEP}"', deep))
    return what


def fuzz_some(root: Path, truth: Mapping[Pair, str], seeds: list[str]) -> list[tuple[str, Look]]:
    """Mutate a document for each seed and look; return what was done and seen."""
    out = []
    paths = [path for path in files_of(root) if kind_of(path, root) != "shard object"]
    for seed in seeds:
        chance = Chance(seed)
        kinds = sorted({kind_of(path, root) for path in paths})
        kind = chance.choice(kinds)
        path = chance.choice([path for path in paths if kind_of(path, root) == kind])
        whole = path.read_bytes()
        what = mutate(path, chance)
        seen = look(root, truth)
        path.write_bytes(whole)
        out.append((f"{seed}: {path.relative_to(root)}: {what}", seen))
    return out


@measurement
@click.option("--mutations", default=2000)
def fuzz(work: Path, seed: int, mutations: int) -> Report:
    """Mutate documents, sealed and not; nothing but a DDKError may come of it."""
    report, classes = Report(), Counter[str]()
    root = make_cache(work, documents=5)
    truth = truth_of(root)
    seeds = [f"{seed}/{number}" for number in range(mutations)]
    for first in range(0, mutations, 100):
        some = seeds[first : first + 100]
        for what, seen in apart(fuzz_some, root, truth, some) or [(some[0], Look(other=["died"]))]:
            classes.update({f"{stage}: {name}" for stage, name, _ in seen.said} or {"nothing"})
            report.wrong += [f"{what}: {error}" for error in seen.other]
            if "sealed" not in what:
                report.wrong += [f"{what}: wrong rows of {pair}" for pair in seen.wrong]
    report.figures = {"mutations": mutations, **dict(classes.most_common())}
    return report


# --- speed ----------------------------------------------------------------------------------------


def make_large(root: Path, megabytes: int, seed: int) -> None:
    """Write a cache of random numbers of about that size."""
    spec = CacheSpec(
        seq_len=256,
        vocab_size=50_000,
        targets=TargetSpec("topk", 32),
        holdout=0.0,
        chunk_rows=16,
        shard_rows=512,
        logprob_step=2.0**-10,
        teacher={},
        tokenizer={},
    )
    inner = [(layout.dtype.itemsize, layout.inner) for layout in spec.arrays.values()]
    row = sum(size * int(np.prod(shape)) for size, shape in inner)
    count = max(1, megabytes * 10**6 // (row * spec.shard_rows))
    rows = {"train": count * spec.shard_rows, "validation": 0}
    root.mkdir()
    create_root(Folder(root), Root(spec, 1, {"noise": {}}, {}))
    store, generator = Store(root, spec), np.random.default_rng(seed)
    plan = DomainPlan((Portion(1, 1, "", rows),))
    plan = DomainPlan(plan.portions, store.metadata("noise", plan))
    store.restore_metadata(plan)
    write_plan(Folder(root), spec, "noise", plan)
    for number in range(count):
        key = ShardKey("noise", "train", number)
        arrays = {
            name: generator.integers(0, 256**layout.dtype.itemsize, (512, *layout.inner))
            for name, layout in spec.arrays.items()
        }
        store.write(key, arrays)
        store.commit(
            key,
            content="",
            rows=512,
            positions=1,
            teacher_loss=1.0,
            batch_rows=1,
            audit={
                "positions": 512 * spec.seq_len,
                "correct": 0,
                "entropy": 0.0,
                "kept_mass": 0.0,
                "kept_mass_bins": [512 * spec.seq_len] + [0] * (MASS_BINS - 1),
                "largest_error": 0.0,
            },
        )
    store.sweep()


def hash_plainly(path: Path) -> int:
    """Read and hash a file; return its size."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(4 * 2**20):
            state.update(piece)
        return file.tell()


@measurement
@click.option("--megabytes", default=400)
def speed(work: Path, seed: int, megabytes: int) -> Report:
    """Time verifying against hashing the same files plainly; it may take twice as long."""
    root = work / "large.zarr"
    make_large(root, megabytes, seed)
    paths, size = files_of(root), 0
    problems = verify(open_cache(root), lambda _: None)
    hashing, verifying = [], []
    for _ in range(3):
        began = time.monotonic()
        with ThreadPoolExecutor(THREADS) as pool:
            size = sum(pool.map(hash_plainly, paths))
        hashing.append(time.monotonic() - began)
        began = time.monotonic()
        problems += verify(open_cache(root), lambda _: None)
        verifying.append(time.monotonic() - began)
    plain, ours = statistics.median(hashing), statistics.median(verifying)
    report = Report({"megabytes": size // 10**6, "plain, MB/s": round(size / plain / 1e6)})
    report.figures |= {"verify, MB/s": round(size / ours / 1e6), "ratio": round(plain / ours, 2)}
    report.wrong = [problem.text for problem in problems]
    report.wrong += [] if plain / ours >= 0.5 else ["verifying is slower than half of hashing"]
    return report


if __name__ == "__main__":
    main()
