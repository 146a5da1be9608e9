"""The cost of a step of distillation, compared with cross-entropy and with a live teacher.

One student, one batch, one precision; the variants alternate, and medians are shown. Targets are
random, because the cost of a step does not depend on their values. Peak memory is measured in a
separate process per variant: on a CPU the growth of its resident set over two steps, on CUDA the
peak of torch's allocator.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.functional import kl_div

from benches.common import Record, json_option, middle, once, synchronize
from ddk_cache import SparseTargets
from ddk_train.loss.fused import Targets, Terms, fused_loss
from ddk_train.loss.head import Head
from ddk_train.loss.objective import Mask, Objective, places

SIZES = {
    "tiny": ((128, 4, 4, 352), (448, 6, 7, 1216)),
    "0.1b": ((512, 12, 8, 1536), (1280, 24, 20, 3456)),
    "0.5b": ((1024, 28, 16, 3072), (2560, 36, 20, 8192)),
    "1b": ((1536, 24, 12, 5120), (4096, 32, 32, 11008)),
}
"""Student and a teacher about seven times as large: hidden, layers, heads, intermediate."""

KINDS = {"top-64": (64, 0.9), "sampled-12": (12, 1.0)}
"""Targets: kept entries, and how much of the mass they hold."""


@dataclass(frozen=True)
class Setting:
    """What is the same for all variants."""

    student: str
    vocab: int
    rows: int
    seq_len: int
    device: str
    bf16: bool
    gradient_checkpointing: bool
    compiled: bool
    """The passes over a chunk of our head."""


def make_model(
    shape: tuple[int, int, int, int], vocab: int, seq_len: int, device: str = "cpu"
) -> Any:
    """Return a fresh Llama of this shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, intermediate = shape
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=intermediate, tie_word_embeddings=True,
        max_position_embeddings=max(1024, seq_len),
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config)


class Material:
    """A student with its optimizer, a batch, targets, and a teacher once somebody asks."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        self.setting, device = setting, setting.device
        self.student = self._model(0)
        if setting.gradient_checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=True)
        shape = (setting.rows, setting.seq_len)
        self.tokens = torch.randint(setting.vocab, (shape[0], shape[1] + 1), device=device)
        self.mask = torch.ones(shape, dtype=torch.bool, device=device)
        self.targets = {
            name: random_targets(shape, setting.vocab, k, mass, device)
            for name, (k, mass) in KINDS.items()
        }
        terms = Terms(0.2, compiled=setting.compiled)
        self.objective = Objective(self.student, terms, setting.vocab, setting.bf16)
        self._teacher: Any = None

    def _model(self, which: int) -> Any:
        """Return a new student (0) or teacher (1)."""
        setting = self.setting
        shape = SIZES[setting.student][which]
        return make_model(shape, setting.vocab, setting.seq_len, setting.device)

    @property
    def positions(self) -> int:
        """Return the positions of a step."""
        return self.mask.numel()

    @property
    def counted(self) -> Mask:
        """Return the places of the counted positions, as the trainer finds them at each step."""
        return places(self.mask, self.positions)

    def autocast(self) -> torch.autocast:
        """Return the context of the precision."""
        return torch.autocast(
            torch.device(self.setting.device).type, torch.bfloat16, enabled=self.setting.bf16
        )

    def logits(self) -> torch.Tensor:
        """Return the student's logits (P, V)."""
        with self.autocast():
            out = self.student(input_ids=self.tokens[:, :-1], use_cache=False).logits
        return out.flatten(0, 1).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def teacher_probs(self) -> torch.Tensor:
        """Return a live teacher's distributions (P, V)."""
        if self._teacher is None:
            self._teacher = self._model(1).eval()
            if self.setting.bf16:
                self._teacher.bfloat16()
        out = self._teacher(input_ids=self.tokens[:, :-1], use_cache=False).logits
        return out.flatten(0, 1).float().softmax(-1)  # type: ignore[no-any-return]


def random_targets(shape: tuple[int, int], vocab: int, k: int, mass: float, device: str) -> Targets:
    """Return targets of `k` different ids at each position."""
    stride = vocab // k
    first = torch.randint(stride, (*shape, 1), device=device)
    ids = first + stride * torch.arange(k, device=device)
    probs = torch.rand(ids.shape, device=device)
    probs *= mass / probs.sum(-1, keepdim=True)
    return SparseTargets(ids, probs, torch.full(shape, 1 - mass, device=device))


# --- variants: material → mean loss of a step -----------------------------------------------------


def plain_ce(m: Material) -> torch.Tensor:
    """Cross-entropy as transformers computes it."""
    labels = m.tokens[:, 1:].contiguous()
    with m.autocast():
        out = m.student(
            input_ids=m.tokens[:, :-1], labels=labels, shift_labels=labels, use_cache=False
        )
    return out.loss  # type: ignore[no-any-return]


def fused_ce(m: Material) -> torch.Tensor:
    """Cross-entropy through the fused head."""
    return m.objective(m.tokens, m.counted, None).loss / m.positions  # type: ignore[no-any-return]


def liger_ce(m: Material) -> torch.Tensor:
    """Cross-entropy through Liger's fused head."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    with m.autocast():
        out = m.student.model(input_ids=m.tokens[:, :-1], use_cache=False).last_hidden_state
        weight = m.student.lm_head.weight
        hidden, labels = out.flatten(0, 1), m.tokens[:, 1:].flatten()
        if m.setting.bf16:
            weight, hidden = weight.bfloat16(), hidden.bfloat16()
        return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)  # type: ignore[no-any-return]


def from_cache(m: Material, kind: str) -> torch.Tensor:
    """Our step."""
    sums = m.objective(m.tokens, m.counted, m.targets[kind])
    return sums.loss / m.positions  # type: ignore[no-any-return]


def dense_kd(m: Material, probs_PV: torch.Tensor) -> torch.Tensor:
    """Distillation as it is usually written: log-softmax, CE and KL over whole distributions."""
    logq_PV = m.logits().log_softmax(-1)
    ce = -logq_PV.gather(-1, m.tokens[:, 1:].reshape(-1, 1)).mean()
    return ce + 0.2 * kl_div(logq_PV, probs_PV, reduction="batchmean")


def scattered(m: Material) -> torch.Tensor:
    """Return the top-64 targets as whole distributions (P, V)."""
    targets = m.targets["top-64"]
    dense = torch.zeros(m.positions, m.setting.vocab, device=m.setting.device)
    return dense.scatter_(-1, targets.ids.flatten(0, 1), targets.probs.flatten(0, 1))


VARIANTS: dict[str, Callable[[Material], torch.Tensor]] = {
    "CE, transformers": plain_ce,
    "CE, fused": fused_ce,
    "CE, Liger": liger_ce,
    "cache, top-64": lambda m: from_cache(m, "top-64"),
    "cache, sampled-12": lambda m: from_cache(m, "sampled-12"),
    "dense KD, top-64 scattered": lambda m: dense_kd(m, scattered(m)),
    "live KD": lambda m: dense_kd(m, m.teacher_probs()),
}
BASELINES = ("CE, transformers", "CE, fused", "CE, Liger")


def variants(setting: Setting) -> list[str]:
    """Return the variants that can run here: Liger's kernels need CUDA and the package."""
    try:
        import liger_kernel  # noqa: F401

        liger = setting.device.startswith("cuda")
    except ImportError:
        liger = False
    return [name for name in VARIANTS if liger or name != "CE, Liger"]


# --- measuring ------------------------------------------------------------------------------------


def step(m: Material, name: str) -> float:
    """Take one step; return its seconds."""

    def work() -> None:
        VARIANTS[name](m).backward()
        m.optimizer.step()
        m.optimizer.zero_grad(set_to_none=True)

    return once(work, m.setting.device)


def teacher_forward(m: Material) -> float:
    """Return the seconds of the teacher's forward pass."""
    return once(m.teacher_probs, m.setting.device)


def peak(name: str, values: dict[str, Any], threads: int) -> float:
    """Return the peak memory of two steps of a variant, MiB; this runs in a fresh process."""
    torch.set_num_threads(threads)
    setting = Setting(**values)
    m = Material(setting)
    if setting.device.startswith("cuda"):
        step(m, name)
        step(m, name)
        return torch.cuda.max_memory_allocated() / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(m, name)
    step(m, name)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def compare(setting: Setting, repeats: int, record: Record) -> None:
    """Measure every variant and show them."""
    names, spawn = variants(setting), multiprocessing.get_context("spawn")
    memory = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=spawn) as one:
            memory[name] = one.submit(peak, name, asdict(setting), torch.get_num_threads()).result()
    m = Material(setting)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    teacher: list[float] = []
    for turn in range(repeats + 1):
        for name in names:
            taken = step(m, name)
            if turn:  # the first turn warms up
                seconds[name].append(taken)
        teacher.append(teacher_forward(m))
    medians = {name: middle(values) for name, values in seconds.items()}
    best = min(medians[name] for name in BASELINES if name in medians)
    rows = [
        {
            "variant": name,
            "s per step": medians[name],
            "tokens/s": m.positions / medians[name],
            "of best CE": medians[name] / best,
            "fastest": min(seconds[name]),
            "peak MiB": memory[name],
        }
        for name in names
    ]
    record.table(f"vocabulary {setting.vocab:,}", rows)
    forward = middle(teacher[1:])
    record.table(
        f"live teacher, vocabulary {setting.vocab:,}",
        [
            {
                "teacher forward, s": forward,
                "live KD of cache": medians["live KD"] / medians["cache, top-64"],
                "0.85 x (1 + forward / step)": 0.85 * (1 + forward / medians["cache, top-64"]),
            }
        ],
    )


def head_alone(setting: Setting, positions: int, repeats: int) -> list[dict[str, Any]]:
    """Measure head and loss without a body: plainly and fused.

    Peak memory, on CUDA, is that on top of hidden states, weights and targets.
    """
    hidden_size = SIZES[setting.student][0][0]
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    hidden = torch.randn(positions, hidden_size, device=setting.device, dtype=dtype)
    weight = torch.nn.Parameter(torch.randn(setting.vocab, hidden_size, device=setting.device))
    labels = torch.randint(setting.vocab, (positions,), device=setting.device)
    wide = random_targets((1, positions), setting.vocab, 64, 0.9, setting.device)
    targets = SparseTargets(wide.ids[0], wide.probs[0], wide.tail[0])

    terms = Terms(0.2, compiled=setting.compiled)

    def plain() -> torch.Tensor:
        logits = (hidden @ weight.to(dtype).T).float()
        return torch.nn.functional.cross_entropy(logits, labels)

    def fused(given: Targets | None) -> torch.Tensor:
        return fused_loss(hidden, Head(weight), labels, given, terms).loss / positions

    rows = []
    for name, loss in (
        ("CE, plain", plain),
        ("CE, fused", lambda: fused(None)),
        ("cache, top-64", lambda: fused(targets)),
    ):
        hidden.requires_grad_()
        taken = []
        cuda = setting.device.startswith("cuda")
        if cuda:
            torch.cuda.reset_peak_memory_stats(setting.device)
            before = torch.cuda.memory_allocated(setting.device)
        for _ in range(repeats + 1):
            began = time.perf_counter()
            loss().backward()
            synchronize(setting.device)
            taken.append(time.perf_counter() - began)
            hidden.grad = weight.grad = None
        row: dict[str, Any] = {"head alone": name, "s": middle(taken[1:])}
        if cuda:
            peak = torch.cuda.max_memory_allocated(setting.device)
            row["added peak MiB"] = (peak - before) / 2**20
        rows.append(row)
    return rows


@click.command()
@click.option("--student", type=click.Choice(list(SIZES)), default="tiny", show_default=True)
@click.option("--vocab", "vocabs", type=int, multiple=True, default=(16_384, 128_256))
@click.option("--rows", default=16, show_default=True)
@click.option("--seq-len", default=256, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--bf16/--fp32", default=False, show_default=True)
@click.option("--gradient-checkpointing", is_flag=True)
@click.option("--compiled", is_flag=True, help="Compile the passes over a chunk of the fused loss.")
@click.option(
    "--head-positions",
    default=0,
    help="Positions for the projection alone.",
)
@click.option("--repeats", default=7, show_default=True)
@click.option("--threads", default=0, help="Torch threads; 0 keeps torch's default.")
@json_option
def main(json_path: Path | None, **options: Any) -> None:
    """Compare a step from the cache with CE alone, dense KD and a live teacher."""
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    facts = options | {"threads": torch.get_num_threads()}
    record = Record("step", facts, ("torch", "transformers", "liger-kernel"))
    for vocab in options["vocabs"]:
        names = (
            "student",
            "rows",
            "seq_len",
            "device",
            "bf16",
            "gradient_checkpointing",
            "compiled",
        )
        setting = Setting(vocab=vocab, **{name: options[name] for name in names})
        compare(setting, options["repeats"], record)
        if positions := options["head_positions"]:
            rows = head_alone(setting, positions, options["repeats"])
            record.table(f"head alone, {positions:,} positions, vocabulary {vocab:,}", rows)
    record.write(json_path)
