"""False documents with a correct seal."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from ddk_cache.format.documents import dump
from ddk_cache.hashing import canonical, digest
from stress_tests.look import GROWTH, Look, Pair, apart, files_of, look, truth_of
from stress_tests.material import make_cache
from stress_tests.report import Report, measurement

Tell = Callable[[Path, Path], Any]
"""What changes a cache, with another cache of the same spec at hand."""

Lie = tuple[str, str, Tell]
"""Its name, what the error must name, and the change that makes it."""


def exchange(one: Path, other: Path) -> None:
    """Give each of two files the bytes of the other."""
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a sealed document, and give it the seal that it then has to have."""
    whole = json.loads(path.read_bytes())
    body = whole["attributes"]["ddk"] if "attributes" in whole else whole
    body.pop("format_version")
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
    "prob_levels": [0, 256, 128.0, None],
    "temperatures": [[1.0], [2], [4.0, 2.0], [2.0] * 99, {}, None, [10**400]],
    "seed": [-1, 1.5, 2**64],
    "compression": ["none", 1, None],
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
    """Put false documents into a cache; each must be refused by name, without large memory."""
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
