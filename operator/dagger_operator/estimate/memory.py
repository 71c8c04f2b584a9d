"""Memory of a GPU in training, by part, as DeepSpeed 0.19 and this trainer use it."""

from dataclasses import dataclass

from dagger_operator.api import Training
from dagger_operator.api.training import Offload, Precision
from dagger_operator.estimate.hardware import GIB
from dagger_operator.estimate.models import Shape

TARGETS_AT_ONCE = 4096
"""Rows of logits that exist at a time: `targets_at_once` in `training/loop.py`."""
CONTEXT = 1.2 * GIB
"""What CUDA, NCCL and libraries hold beside PyTorch: 44.69 GiB in use with 43.48 GiB PyTorch's, in the out-of-memory message of prime-rl's
Qwen3-0.6B SFT at 65K on an H100 (`benchmarks/baselines`)."""
REDUCE_BUCKET = 1 << 24
"""Gradients that are reduced at a time, as `training/engine.py` has it; a matrix that is larger is reduced by itself."""
WITHOUT_ZERO = 500_000_000
"""The same without ZeRO, after the last pass: DeepSpeed's own."""
LIVE = 1_050_000_000
"""Parameters that ZeRO-3 keeps gathered: defaults of `stage3_max_live_parameters` and `stage3_prefetch_bucket_size`."""


@dataclass(frozen=True)
class Setup:
    """What of a run's training settings sets its memory."""

    stage: int
    ranks: int
    offload: bool
    bf16: bool
    checkpointing: bool
    tokens: float
    """Tokens of a forward pass on one rank."""
    adapter_rank: int = 0
    """Of `training.lora`, taken to be on all linear layers; 0 trains all weights."""

    @classmethod
    def of(cls, training: Training) -> "Setup":
        """A pass holds `microBatchTokens`, or one longer sequence, shared by `sequenceParallel` ranks."""
        longest = max(training.micro_batch_tokens, training.max_sequence_tokens)
        return cls(
            stage=training.deepspeed.zero_stage,
            ranks=training.nodes * training.processes_per_node,
            offload=training.deepspeed.offload is Offload.OPTIMIZER and training.deepspeed.zero_stage > 0,
            bf16=training.precision is Precision.BF16,
            checkpointing=training.activation_checkpointing,
            tokens=longest / getattr(training, "sequence_parallel", 1),
            adapter_rank=training.lora.rank if training.lora else 0,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by part, when most is in use."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    """What the forward pass keeps for the backward pass."""
    layer: float
    """Of one layer in its backward pass: recomputed activations, and gradients of activations. 0 when the head is at work."""
    logits: float
    """0 when a layer is at work; what reducing the head's gradient takes, where that is more."""
    buffers: float
    """Communication, gathered weights, CUDA's context."""
    host: float = 0.0
    """Bytes of host memory of one rank; not part of the total."""

    @property
    def total(self) -> float:
        """Bytes on the GPU."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.layer + self.logits + self.buffers


def kept_by_a_layer(shape: Shape, width: int) -> float:
    """Bytes that one layer keeps of each token, `width` bytes a number (Korthikanti et al. 2022 for the method, arXiv 2205.05198).

    Each of two norms: its input in FP32, the normalised input, the output. Norms of queries and keys the same. Attention that writes
    no scores: q, k, v and output. SwiGLU: gate, its activation, up, their product; of experts the visited ones, and their inputs and
    outputs.
    """
    norm = 4 + 2 * width
    experts = max(1, shape.active_experts)
    routed = 2 * width * shape.hidden * shape.active_experts
    norms = 2 * norm * shape.hidden + (norm * (shape.q_width + shape.kv_width) if shape.qk_norm else 0)
    return norms + 2 * width * (shape.q_width + shape.kv_width) + 4 * width * shape.intermediate * experts + routed


def in_a_layer(shape: Shape, width: int) -> float:
    """Bytes of each token in one layer's backward pass: what it keeps, and the gradients of gate, up and their product."""
    return kept_by_a_layer(shape, width) + 3 * width * shape.intermediate * max(1, shape.active_experts)


def activations(shape: Shape, width: int, checkpointing: bool) -> float:
    """Bytes of each token that the forward pass keeps: each layer's input alone, or all that a layer needs."""
    return shape.layers * (width * shape.hidden if checkpointing else kept_by_a_layer(shape, width))


def logits(shape: Shape, rows: float, copies: int = 3) -> float:
    """Bytes of logits when most exist. FP32 copies in the backward pass of torch's cross-entropy: log-probabilities, their gradient,
    the logits' gradient."""
    return 4 * copies * rows * shape.vocabulary


def training_memory(shape: Shape, setup: Setup) -> Memory:
    """Memory of one rank at the fuller of two moments: the head's backward pass, or that of the layer before it.

    States as in ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3), with what `training/engine.py` configures: weights in BF16,
    and in FP32 with both of Adam's moments in the optimiser; gradients summed in FP32, which ZeRO-1 does whole on each rank. Without ZeRO
    all is FP32, with BF16 copies under autocast. Offloaded are the optimiser and with ZeRO-3 gradients; with ZeRO-2 those of FP32 alone,
    since sums in another precision than the weights' stay on the GPU (DeepSpeed 0.19, `_use_compact_grad_partition_buffer`). Where
    adapters are trained, only they have gradients and a part in the optimiser.
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
    on_its_way = _reducing(head) - _reducing(largest) if setup.stage > 1 else 0  # with ZeRO-1 it is when all passes are over
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
    """Bytes on one GPU before its first step: DeepSpeed puts all weights there before ZeRO-3 shards them (0.19,
    `_configure_distributed_model`), so they have to fit for once on however many GPUs."""
    return CONTEXT + (2 if setup.bf16 and setup.stage else 4) * (shape.parameters + shape.adapters(setup.adapter_rank))


def _buffers(number: int, trained: int, largest: int, width: int, setup: Setup) -> float:
    """What reduction takes in a layer's backward pass, and gathered weights."""
    if setup.stage == 0:
        return (width if setup.bf16 else 0) * number + 4 * min(trained, WITHOUT_ZERO)
    gathered = width * min(number, LIVE) if setup.stage == 3 and setup.ranks > 1 else 0
    return _reducing(largest) + gathered


def _reducing(gradient: int) -> float:
    """The bucket, allocated whole, and what is reduced at a time, that is it or a larger gradient: once more, and in FP32."""
    return 4 * REDUCE_BUCKET + 8 * max(REDUCE_BUCKET, gradient)
