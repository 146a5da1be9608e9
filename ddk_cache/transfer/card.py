"""The card of a data set with a cache: what `ddk-cache info` knows, as Markdown.

What only a person can say, above all the license of teacher and documents, is left open and marked.
"""

from __future__ import annotations

import math

from ddk_cache.inspect.describe import Facts, printable
from ddk_cache.types import TRAIN, VALIDATION

TEMPLATE = """---
license: other  # TODO: the license under which teacher and documents allow this to be shared
task_categories: [text-generation]
tags: [ddk, distillation, zarr]
---

# {name}

Next-token targets of a teacher for offline distillation with ddk (`ddk-distill`).

```sh
ddk-train run {url} RUN --student …
ddk-cache pull {url} {name}
```

| | |
|---|---|
| teacher | {teacher} ({dtype}) |
| tokenizer | {tokenizer} |
| targets | {targets} of {vocab:,} ids, rows of {seq_len:,} tokens |
| size | {tokens:,} tokens, {bytes:,} bytes, {per_token:.2f} bytes per token |
| fingerprint | `{fingerprint}` |

| domain | documents | training rows | held-out rows | teacher's perplexity | \
KL lost, nats | total variation |
|---|---|---|---|---|---|---|
{domains}

License of the teacher: TODO. License and origin of the documents: TODO.
"""


def card(facts: Facts, url: str) -> str:
    """Return the card of a cache that lies at a URL."""
    spec, provenance = facts["spec"], facts["provenance"]
    domains = []
    for name, domain in facts["domains"].items():
        lost, perplexity = domain["seen"].get("fidelity") or {}, domain["teacher_perplexity"]
        cells = [
            f"{domain['documents']:,}",
            f"{domain['rows'][TRAIN]:,}",
            f"{domain['rows'][VALIDATION]:,}",
            _figure(perplexity, ",.2f"),
            _figure(lost.get("kl") or None, ".4f"),
            _figure(lost.get("total_variation"), ".3f"),
        ]
        domains.append(f"| {name} | {' | '.join(cells)} |")
    return TEMPLATE.format(
        name=printable(url.rstrip("/").rpartition("/")[2]),
        url=printable(url),
        teacher=_plain(provenance.get("teacher", "unknown")),
        dtype=_plain(spec["teacher"].get("dtype", "callable")),
        tokenizer=_plain(provenance.get("tokenizer", "unknown")),
        targets=spec["targets"],
        vocab=spec["vocab_size"],
        seq_len=spec["seq_len"],
        tokens=facts["tokens"],
        bytes=facts["bytes"],
        per_token=facts["bytes_per_token"]["all"],
        fingerprint=facts["fingerprint"],
        domains="\n".join(domains),
    )


def _plain(text: str) -> str:
    """Return text for a cell of a table; of a path only the last part, which is no secret."""
    return printable(text.rstrip("/").rpartition("/")[2] if text.startswith("/") else text).replace(
        "|", "\\|"
    )


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)
