"""Compares the formulas with figures that others published.

prime-rl: `benchmarks/baselines` of PrimeIntellect-ai/prime-rl at commit 559b4477, measured in January 2026: full fine-tuning under FSDP,
every layer recomputed, one sequence per micro-batch. It counts MFU in its own way (`src/prime_rl/trainer/perf.py`): attention as
wide as `hidden` and without the mask, so half of its pairs do not exist.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dagger_operator.estimate.assumptions import Assumptions
from dagger_operator.estimate.flops import training
from dagger_operator.estimate.hardware import GIB, GPUS
from dagger_operator.estimate.memory import activations, in_a_layer, logits
from dagger_operator.estimate.models import KNOWN, Shape
from dagger_operator.estimate.workload import Tokens


@dataclass(frozen=True)
class Benchmark:
    """One of prime-rl's stored results."""

    gpus: int
    gpu: str
    model: str
    kind: str
    """SFT has all logits at once, RL a chunked head."""
    tokens: int
    """Tokens per sequence."""
    throughput: float
    """Tokens per second over all GPUs."""
    mfu: float
    """As prime-rl counts it."""
    peak: float
    """GiB on one GPU, PyTorch's own."""

    @property
    def shape(self) -> Shape:
        return next(shape for name, shape in KNOWN.items() if name.endswith(self.model))

    def __str__(self) -> str:
        return f"{self.model} {self.kind} {self.tokens // 1024}K, {self.gpus} {self.gpu}"

    @property
    def throughput_at_its_mfu(self) -> float:
        """Tokens per second that follow from its MFU, counted as prime-rl does."""
        return self.mfu * self.gpus * GPUS[self.gpu].flops / prime_rl_flops(self.shape, self.tokens)

    @property
    def throughput_by_default(self) -> float:
        """Tokens per second at the estimate's own utilisation, pairs and recomputation."""
        work = Tokens(tokens=1, pairs=self.tokens / 2, targets=1)
        return Assumptions.utilisation * self.gpus * GPUS[self.gpu].flops / training(self.shape, work, checkpointing=True)

    @property
    def peak_by_formula(self) -> float:
        """GiB with FSDP: FP32 weights, gradients and moments are sharded, and the head and two layers are gathered in BF16."""
        shape = self.shape
        gathered = 2 * (shape.head + 2 * (shape.attention + shape.mlp * max(1, shape.experts)))
        kept = self.tokens * activations(shape, 2, checkpointing=True)
        moments = [self.tokens * in_a_layer(shape, 2)]
        if self.kind == "SFT":
            # Besides the three copies of the backward pass it keeps the logits, in BF16 and in FP32.
            moments.append(logits(shape, self.tokens, copies=4) + 2 * self.tokens * shape.vocabulary)
        return (16 * shape.parameters / self.gpus + gathered + kept + max(moments)) / GIB


def prime_rl_flops(shape: Shape, tokens: int) -> float:
    """Return the FLOP per token in training as prime-rl counts them."""
    return 6 * (shape.body + shape.head) + 12 * shape.layers * shape.hidden * tokens


PRIME_RL = (
    Benchmark(8, "H100-80GB", "Qwen3-4B-Instruct-2507", "SFT", 16384, 49717, 0.26551, 54.63),
    Benchmark(8, "H200", "Qwen3-4B-Instruct-2507", "SFT", 16384, 53142, 0.28380, 54.63),
    Benchmark(8, "H100-80GB", "Qwen3-4B-Instruct-2507", "RL", 16384, 26026, 0.13899, 17.10),
    Benchmark(8, "H100-80GB", "Qwen3-4B-Instruct-2507", "RL", 65536, 28966, 0.35369, 36.10),
    Benchmark(8, "H200", "Qwen3-4B-Instruct-2507", "RL", 65536, 29544, 0.36075, 36.10),
    Benchmark(8, "B200", "Qwen3-4B-Instruct-2507", "SFT", 16384, 68356, 0.16046, 54.59),
    Benchmark(8, "B200", "Qwen3-4B-Instruct-2507", "SFT", 65536, 26395, 0.14167, 171.53),
    Benchmark(1, "H100-80GB", "Qwen3-0.6B", "SFT", 8192, 26005, 0.16814, 31.74),
    Benchmark(1, "H100-80GB", "Qwen3-0.6B", "SFT", 16384, 25486, 0.23742, 52.84),
    Benchmark(1, "H100-80GB", "Qwen3-0.6B", "RL", 16384, 11896, 0.11082, 12.53),
    Benchmark(1, "H100-80GB", "Qwen3-0.6B", "RL", 65536, 10147, 0.26805, 19.56),
    Benchmark(1, "A6000", "Qwen3-0.6B", "SFT", 8192, 6604, 0.13534, 31.21),
)
"""All results on GPUs and models known here, without LoRA and offloading. Prime-rl counts an A6000 as an A100, 312 TFLOP/s."""


def table() -> Iterator[str]:
    """Yield the comparison as lines of Markdown."""
    yield "| setup (prime-rl) | tokens/s | at its MFU | at our default | peak GiB | by formula |"
    yield "|---|---:|---:|---:|---:|---:|"
    for one in PRIME_RL:
        theirs = f"{one.throughput_at_its_mfu:,.0f}" if one.gpu != "A6000" else "-"
        ours = f"{one.throughput_by_default:,.0f} ({_off(one.throughput_by_default, one.throughput)})"
        peak = f"{one.peak_by_formula:.1f} ({_off(one.peak_by_formula, one.peak)})"
        yield f"| {one} | {one.throughput:,.0f} | {theirs} | {ours} | {one.peak:.1f} | {peak} |"


def _off(predicted: float, published: float) -> str:
    return f"{100 * (predicted / published - 1):+.0f} %"
