"""Conversations, a student and a training step for `training.py`."""

import asyncio
import os
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dagger_operator.api import Storage, Training
from dagger_operator.api.training import Packing
from dagger_operator.store.objects import Store
from dagger_operator.training import attention, engine
from dagger_operator.training.batches import Limits
from dagger_operator.training.checkpoints import Checkpoints, Tally
from dagger_operator.training.flex import ROW_MULTIPLE
from dagger_operator.training.loss import Objective
from dagger_operator.training.packing import Pack, pack
from dagger_operator.training.rows import Share, collate
from dagger_operator.training.samples import Sample
from dagger_operator.training.strand import Strand
from dagger_operator.training.tree import paths

TURNS = 24
"""Length of the conversation with which memory is measured."""
VARIANTS = ("trees", "labels", "all logits", "checkpointing", "all logits, checkpointing", "head", "head, all logits")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Shape:
    """Lengths in conversations, in tokens: about a tenth of those in software repair."""

    turn: int
    """Tokens of an action and the resulting observation."""
    label: int
    first: int = 400
    """Tokens of the first prompt."""


SHAPES = {"100 turns": Shape(60, 20), "50 turns": Shape(120, 30)}
"""Named by how many turns reach 64K tokens, the paper's context, of which it allows 100. Lengths as in `daggerctl estimate`: 4,000 tokens
before the first turn, and 300 per action, at most a third of what a turn adds."""
FOR_MEMORY_SHAPE = "50 turns"


@dataclass(frozen=True)
class Size:
    channels: int
    """Hidden size."""
    tokens: int
    """Tokens of the vocabulary per channel."""

    @property
    def vocabulary(self) -> int:
        return self.tokens * self.channels


SIZES = {"narrow": Size(256, 4), "wide": Size(512, 4), "wide with a large vocabulary": Size(512, 32)}
"""Students of four layers. At 32 turns of the longer shape attention has the same share of the work as in Qwen3-8B at 64K tokens (narrow)
and 32K (wide); of the shorter shape, which ends at 2,320 tokens, the same as at 35K and 17K. With 4 tokens per channel the head has the
same share of a token's work as on top of Qwen3-8B's 36 layers; Qwen3-8B has 37 per channel."""
FOR_MEMORY = "wide with a large vocabulary"


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak: int = 0
    """Bytes above what was in use before."""
    whole: int = 0
    """Bytes in use at the peak."""


class Load:
    """One conversation with a teacher's label at every turn. Where the teacher acted (`acted`, a share of turns, spread evenly) the label
    is the action; where the student acted, it never is."""

    def __init__(self, turns: int, shape: str, acted: float = 0.0) -> None:
        self.shape, self.labels = SHAPES[shape], turns
        first, turn_tokens, label_tokens = self.shape.first, self.shape.turn, self.shape.label
        random, vocabulary = np.random.default_rng(turns), min(size.vocabulary for size in SIZES.values())
        conversation = random.integers(1, vocabulary, first + turns * turn_tokens, dtype=np.int32)
        self.samples = []
        for turn in range(turns):
            end = first + turn * turn_tokens
            state, action = conversation[:end], conversation[end : end + label_tokens]
            teacher_acted = int((turn + 1) * acted) > int(turn * acted)
            label = action if teacher_acted else random.integers(1, vocabulary, label_tokens, dtype=np.int32)
            self.samples.append(Sample("0001/00000", turn, Strand(np.concatenate([state, label])), len(state)))

    def packs(self, variant: str) -> list[Pack]:
        return self._apart if variant == "labels" else self._together

    def tokens(self, variant: str) -> int:
        return sum(map(len, self.packs(variant)))

    def flops(self, variant: str, width: str) -> float:
        """Return the model FLOP of forward and backward: 6 per weight and token, 12 per channel and attended pair (PaLM, appendix B).

        The head counts only at targets."""
        config = student(width).policy.config
        weights = sum(parameter.numel() for name, parameter in student(width).policy.named_parameters() if "embed" not in name)
        pairs = sum(
            len(chain) * (sum(end - start for start, end in before) + (len(chain) + 1) / 2)
            for one in self.packs(variant)
            for chain, before in zip(one.chains, paths(one.chains), strict=True)
        )
        channels = config.num_hidden_layers * config.num_attention_heads * config.head_dim
        head = config.hidden_size * config.vocab_size
        return 6 * (weights * self.tokens(variant) + head * self.labels * self.shape.label) + 12 * channels * pairs

    @cached_property
    def _together(self) -> list[Pack]:
        return pack(self.samples, 1 << 20)

    @cached_property
    def _apart(self) -> list[Pack]:
        return pack(self.samples, 1 << 20, Packing.LABELS)


@cache
def student(width: str) -> Objective:
    attention.register()
    torch.manual_seed(1)
    size = SIZES[width]
    channels = size.channels
    shape = {"hidden_size": channels, "intermediate_size": 3 * channels, "num_hidden_layers": 4}
    heads = {"num_attention_heads": channels // 64, "num_key_value_heads": channels // 128, "head_dim": 64}
    config = Qwen3Config(vocab_size=size.vocabulary, tie_word_embeddings=True, **shape, **heads)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    return Objective(Qwen3ForCausalLM._from_config(config, attn_implementation=attention.NAME)).to(DEVICE, dtype).train()


def limits() -> Limits:
    """Return limits of a pass: at most 4,096 tokens, or one tree; the same memory bound for both variants."""
    compiled = DEVICE.type == "cuda"
    return Limits(4096, 4096, ROW_MULTIPLE if compiled else 1, few_lengths=compiled)


def measure(load: Load, variant: str, width: str) -> Measured:
    """Run one step without its update."""
    objective, bounds = student(width), limits()
    began = time.perf_counter()
    rows: list[list[Pack]] = [[]]
    for one in load.packs(variant):
        if rows[-1] and sum(map(len, rows[-1])) + len(one) > bounds.tokens:
            rows.append([])
        rows[-1].append(one)
    for row in rows:
        batch = collate(row, bounds, Share(), DEVICE)
        loss = _all_logits(objective, batch) if "all logits" in variant else objective(**batch)
        loss.backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    objective.zero_grad()
    return Measured(seconds)


def _all_logits(objective: Objective, batch: dict[str, Any]) -> torch.Tensor:
    """Compute the loss like a trainer that masks labels: logits of every token, those without a target ignored."""
    hidden = objective.policy.get_decoder()(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, tree=batch["tree"]
    ).last_hidden_state
    logits = objective.policy.get_output_embeddings()(hidden)[0].float()
    return torch.nn.functional.cross_entropy(logits[batch["prev"]], batch["targets"], reduction="sum")


def leave_the_head_alone(width: str) -> None:
    """Replace the student's decoder by one that returns random values: a step is then only the head and the loss."""
    policy = student(width).policy

    def decoder(input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        size = (*input_ids.shape, SIZES[width].channels)
        return SimpleNamespace(last_hidden_state=torch.randn(size, device=DEVICE, dtype=policy.dtype, requires_grad=True))

    policy.get_decoder = lambda: decoder


def measure_memory(load: Load, variant: str, width: str) -> Measured:
    """Measure the peak memory of a step, in a process that has run a smaller one before."""
    if variant.startswith("head"):
        leave_the_head_alone(width)
    if "checkpointing" in variant:
        student(width).policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    measure(Load(1, FOR_MEMORY_SHAPE), variant, width)
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        took = measure(load, variant, width)
        return Measured(took.seconds, torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_allocated())
    with peak_memory() as read:
        took = measure(load, variant, width)
    return Measured(took.seconds, *read())


@contextmanager
def peak_memory() -> Iterator[Any]:
    """Measure peak resident memory by sampling every millisecond: the kernel's own high-water mark cannot be reset."""
    page, ended = resource.getpagesize(), threading.Event()
    statm = Path("/proc/self/statm")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    before = peak = resident()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: (peak - before, peak)
    finally:
        ended.set()
        thread.join()


@cache
def matmul_rate() -> float:
    """Return the FLOP/s of a large matrix product measured now, instead of a data sheet's."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    left, right = (torch.randn(2048, 2048, device=DEVICE, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        left @ right
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def measure_resume(width: str) -> dict[str, float]:
    """Measure one rank's checkpoint as in training: stored, downloaded, verified and loaded, compared with a step."""
    step = measure(Load(TURNS, FOR_MEMORY_SHAPE), "trees", width).seconds
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_store_and_resume(Path(folder), width, step))


async def _store_and_resume(folder: Path, width: str, step: float) -> dict[str, float]:
    weights = folder / "weights"
    student(width).policy.save_pretrained(weights)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{probe.getsockname()[1]}", LOCAL_RANK="0", GLOO_SOCKET_IFNAME="lo")
    os.environ.setdefault("DS_ACCELERATOR", DEVICE.type)
    device = engine.join(0, 1, 0)
    training = Training(precision="FP32", processes_per_node=1, gpus_per_node=int(DEVICE.type == "cuda"))
    trainer = engine.build(training, weights, 1, device, engine.adamw(training))
    trainer.backward(trainer(**collate(Load(1, FOR_MEMORY_SHAPE).packs("trees"), limits(), Share(), device)))
    trainer.step()
    store = Store.open(Storage(url=f"file://{folder}/store"))
    kept = Checkpoints(store, folder, 1, "", zero_stage=training.deepspeed.zero_stage, node=0, every_steps=1)
    await kept.resume(trainer)  # from nothing: a training begins so
    stored = await kept.save(trainer, Tally(losses=(1.0,)))
    began = time.perf_counter()
    await kept.resume(trainer)
    resumed = time.perf_counter() - began
    size = sum(info.size for info in await store.list(""))
    torch.distributed.destroy_process_group()
    return {"step s": step, "store s": stored, "resume s": resumed, "MiB": size / 2**20}
