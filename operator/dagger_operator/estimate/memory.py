"""GPU memory in training, by part, as DeepSpeed 0.19 and this trainer use it."""

from dataclasses import dataclass

from dagger_operator.api import Training
from dagger_operator.api.training import REDUCED_AT_ONCE, TARGETS_AT_ONCE, Offload, Precision
from dagger_operator.estimate.hardware import GIB
from dagger_operator.estimate.models import Shape

CONTEXT = 1.2 * GIB
"""Memory that CUDA, NCCL and libraries hold besides PyTorch: 44.69 GiB in use of which 43.48 GiB PyTorch's, in the out-of-memory message
of prime-rl's Qwen3-0.6B SFT at 65K on an H100 (`benchmarks/baselines`)."""
WITHOUT_ZERO = 500_000_000
"""Gradients that are reduced at a time without ZeRO, after the last pass: DeepSpeed's default."""
LIVE = 1_050_000_000
"""Parameters that ZeRO-3 keeps gathered: defaults of `stage3_max_live_parameters` and `stage3_prefetch_bucket_size`."""


@dataclass(frozen=True)
class Setup:
    """The training settings of a run that determine its memory."""

    stage: int
    ranks: int
    offload: bool
    bf16: bool
    checkpointing: bool
    tokens: float
    """Tokens of a forward pass on one rank."""
    adapter_rank: int = 0
    """Rank of `training.lora`, assumed to cover all linear layers; 0 trains all weights."""

    @classmethod
    def of(cls, training: Training) -> "Setup":
        """Return a run's settings. A pass holds `microBatchTokens`, or one longer sequence, shared by `sequenceParallel` ranks."""
        longest = max(training.micro_batch_tokens, training.max_sequence_tokens)
        return cls(
            stage=training.deepspeed.zero_stage,
            ranks=training.nodes * training.processes_per_node,
            offload=training.deepspeed.offload is Offload.OPTIMIZER and training.deepspeed.zero_stage > 0,
            bf16=training.precision is Precision.BF16,
            checkpointing=training.activation_checkpointing,
            tokens=longest / training.sequence_parallel,
            adapter_rank=training.lora.rank if training.lora else 0,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by part, at the peak."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    """What the forward pass keeps for the backward pass."""
    layer: float
    """One layer in its backward pass: recomputed activations, and gradients of activations. 0 if the peak is in the head."""
    logits: float
    """0 if the peak is in a layer; otherwise, if larger, what reducing the head's gradient takes."""
    buffers: float
    """Communication, gathered weights, CUDA's context."""
    host: float = 0.0
    """Bytes of host memory of one rank; not part of the total."""

    @property
    def total(self) -> float:
        """Bytes on the GPU."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.layer + self.logits + self.buffers


def kept_by_a_layer(shape: Shape, width: int) -> float:
    """Return the bytes that one layer keeps per token, with `width` bytes per number (method: Korthikanti et al. 2022, arXiv 2205.05198).

    Two norms, each with its input in FP32, the normalised input, and the output. Norms of queries and keys likewise. Attention that
    stores no scores: q, k, v and output. SwiGLU: gate, its activation, up, their product; with experts only the active ones, and their
    inputs and outputs.
    """
    norm = 4 + 2 * width
    experts = max(1, shape.active_experts)
    routed = 2 * width * shape.hidden * shape.active_experts
    norms = 2 * norm * shape.hidden + (norm * (shape.q_width + shape.kv_width) if shape.qk_norm else 0)
    return norms + 2 * width * (shape.q_width + shape.kv_width) + 4 * width * shape.intermediate * experts + routed


def in_a_layer(shape: Shape, width: int) -> float:
    """Return the bytes per token in one layer's backward pass: what it keeps, and the gradients of gate, up and their product."""
    return kept_by_a_layer(shape, width) + 3 * width * shape.intermediate * max(1, shape.active_experts)


def activations(shape: Shape, width: int, checkpointing: bool) -> float:
    """Return the bytes per token that the forward pass keeps: only each layer's input, or all that a layer needs."""
    return shape.layers * (width * shape.hidden if checkpointing else kept_by_a_layer(shape, width))


def logits(shape: Shape, rows: float, copies: int = 3) -> float:
    """Return the bytes of logits at the peak. FP32 copies in the backward pass of torch's cross-entropy: log-probabilities, their gradient,
    the logits' gradient."""
    return 4 * copies * rows * shape.vocabulary


def training_memory(shape: Shape, setup: Setup) -> Memory:
    """Return the memory of one rank at the larger of two moments: the head's backward pass, or that of the layer before it.

    States as in ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3), configured as in `training/engine.py`: weights in BF16, and
    in FP32 with both of Adam's moments in the optimiser; gradients accumulated in FP32, which ZeRO-1 keeps whole on each rank. Without
    ZeRO all is FP32, with BF16 copies under autocast. Offloading moves the optimiser and with ZeRO-3 gradients; with ZeRO-2 only those of
    FP32 training, since sums in another precision than the weights' stay on the GPU (DeepSpeed 0.19,
    `_use_compact_grad_partition_buffer`). If adapters are trained, only they have gradients and optimiser state.
    """
    adapters, width = shape.adapters(setup.adapter_rank), 2 if setup.bf16 else 4
    number = shape.parameters + adapters
    trained = adapters or number
    over = {stage: setup.ranks if setup.stage >= stage else 1 for stage in (1, 2, 3)}
    weights = number * (width if setup.stage else 4) / over[3]
    moved = setup.offload and setup.stage >= (3 if setup.bf16 else 2)
    gradients = 0.0 if moved else 4 * trained / over[2]
    optimiser = (12 if setup.stage else 8) * trained / over[1]
    kept = setup.tokens * activations(shape, width, setup.checkpointing)
    moments = {"layer": setup.tokens * (in_a_layer(shape, width) - (0 if setup.checkpointing else kept_by_a_layer(shape, width)))}
    largest, head = (0, 0) if adapters else (shape.matrix, shape.head)
    on_its_way = _reducing(head) - _reducing(largest) if setup.stage > 1 else 0  # ZeRO-1 reduces after all passes
    moments["logits"] = max(logits(shape, min(TARGETS_AT_ONCE, setup.tokens)), on_its_way)
    fuller = max(moments, key=lambda part: moments[part])
    return Memory(
        weights=weights,
        gradients=gradients,
        optimiser=0.0 if setup.offload else optimiser,
        activations=kept,
        layer=moments["layer"] if fuller == "layer" else 0.0,
        logits=moments["logits"] if fuller == "logits" else 0.0,
        buffers=CONTEXT + _buffers(number, trained, largest, width, setup),
        host=optimiser + 4 * trained / over[1] if setup.offload else 0.0,
    )


def before_sharding(shape: Shape, setup: Setup) -> float:
    """Return the bytes on one GPU before its first step: DeepSpeed puts all weights there before ZeRO-3 shards them (0.19,
    `_configure_distributed_model`), so they must fit once, however many GPUs there are."""
    return CONTEXT + (2 if setup.bf16 and setup.stage else 4) * (shape.parameters + shape.adapters(setup.adapter_rank))


def _buffers(number: int, trained: int, largest: int, width: int, setup: Setup) -> float:
    """Return what reduction takes in a layer's backward pass, plus gathered weights."""
    if setup.stage == 0:
        return (width if setup.bf16 else 0) * number + 4 * min(trained, WITHOUT_ZERO)
    gathered = width * min(number, LIVE) if setup.stage == 3 and setup.ranks > 1 else 0
    return _reducing(largest) + gathered


def _reducing(gradient: int) -> float:
    """Return the bytes of the bucket, allocated whole, and of what is reduced at once (it or a larger gradient): a copy, and in FP32."""
    return 4 * REDUCED_AT_ONCE + 8 * max(REDUCED_AT_ONCE, gradient)
