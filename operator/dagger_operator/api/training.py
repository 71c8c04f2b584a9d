"""How a round's labels become the next student."""

from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from dagger_operator.api.mixing import Schedule, schedule_rule
from dagger_operator.api.model import ApiModel, Misfit, Rule
from dagger_operator.api.pods import PodSettings


class TrainingMode(StrEnum):
    ENABLED = "Enabled"
    DISABLED = "Disabled"


class Aggregation(StrEnum):
    ALL_ROUNDS_FROM_BASE = "AllRoundsFromBase"
    ALL_ROUNDS_WARM_START = "AllRoundsWarmStart"
    CURRENT_ROUND_ONLY = "CurrentRoundOnly"


class BatchUnit(StrEnum):
    LABELS = "Labels"
    TRAJECTORIES = "Trajectories"


class Packing(StrEnum):
    TREES = "Trees"
    LABELS = "Labels"


class Loss(StrEnum):
    CROSS_ENTROPY = "CrossEntropy"
    FORWARD_KL = "ForwardKL"


class LearningRateSchedule(StrEnum):
    CONSTANT = "Constant"
    LINEAR = "Linear"
    COSINE = "Cosine"


class Precision(StrEnum):
    BF16 = "BF16"
    FP32 = "FP32"


class Offload(StrEnum):
    NONE = "None"
    OPTIMIZER = "Optimizer"


class DeepSpeed(ApiModel):
    """How the model is sharded over ranks."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """ZeRO stage: 1 shards the optimiser state, 2 also gradients, 3 also weights."""
    offload: Offload = Offload.NONE
    """What is kept in host memory instead of GPU memory."""


_ONE_ACTOR_AT_LEAST = "with both at 0 there is nothing to learn: write a weight above 0 for one of them"


class LabelWeights(ApiModel):
    """Weight of a label's tokens, by who acted at its state."""

    cel: ClassVar[tuple[Rule, ...]] = (Rule("self.studentActed > 0 || self.teacherActed > 0", _ONE_ACTOR_AT_LEAST),)

    student_acted: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Weight at states where the student acted; 0 leaves them out."""
    teacher_acted: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Weight at states where the teacher acted; 0 leaves them out."""

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if self.student_acted == self.teacher_acted == 0:
            raise Misfit("studentActed", 0, _ONE_ACTOR_AT_LEAST)
        return self


Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$", max_length=128)]


class Lora(ApiModel):
    """Low-rank adapters (LoRA): a round's policy is the run's initial one plus a small adapter, and only the adapter is trained."""

    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank of the update that is added to each weight matrix."""
    alpha: Annotated[int, Field(ge=1, le=65536)] = 32
    """The update is scaled by alpha / rank."""
    target_modules: Annotated[list[Module], Field(min_length=1, max_length=64)] | None = None
    """Names of the linear layers that get an adapter, such as q_proj; all linear layers of the decoder by default."""


TARGETS_AT_ONCE = 4096
"""Rows of logits that a rank holds in memory at a time, each as wide as the vocabulary, in FP32."""
REDUCED_AT_ONCE = 1 << 24
"""Gradient elements that ranks reduce at a time, in a buffer that is allocated whole: what transformers uses for a model of width 4096. A
larger gradient is reduced by itself, in place."""
MOST_STEPS = 1_000_000
_ROWS_STAY_ON_A_NODE = "the ranks that share a row are on one node: write a divisor of processesPerNode"
_STEPS = f"these are optimiser steps: write a number in 1..{MOST_STEPS}"


class Training(ApiModel):
    """Training on the tokens of the teacher's turns only (paper, section 3)."""

    cel: ClassVar[tuple[Rule, ...]] = (
        schedule_rule("steps", 1, MOST_STEPS, _STEPS),
        Rule(
            "self.gpusPerNode == 0 || self.processesPerNode == self.gpusPerNode",
            "a rank has a GPU of its own: write the same number into processesPerNode and gpusPerNode, or gpusPerNode 0 for the CPU",
        ),
        Rule("self.processesPerNode % self.sequenceParallel == 0", _ROWS_STAY_ON_A_NODE),
    )

    mode: TrainingMode = TrainingMode.ENABLED
    """Disabled only collects labels: rounds end after rollouts, and the student does not change."""
    aggregation: Aggregation = Aggregation.CURRENT_ROUND_ONLY
    """Which labels a round trains on, and from which weights it starts. The paper's recipe is CurrentRoundOnly, warm-started; classical
    DAgger is AllRoundsFromBase."""
    epochs: Annotated[int, Field(ge=1, le=10000)] = 3
    """Passes over the round's training set."""
    steps: Schedule | None = None
    """Optimiser steps by round, instead of `epochs`; the data set is repeated or cut to fit."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    """Batch size of one optimiser step over all ranks, in units of `batchUnit`."""
    batch_unit: BatchUnit = BatchUnit.TRAJECTORIES
    """Whether a batch counts labels or whole trajectories."""
    packing: Packing = Packing.TREES
    """Trees trains on a trajectory and all its labels in one pass, processing what they share once. Labels gives each label a sequence of
    its own: the same result at many times the cost, for comparison."""
    loss: Loss = Loss.CROSS_ENTROPY
    """CrossEntropy learns the tokens of the labels, as the paper does. ForwardKL learns the teacher's distribution over each token, as far
    as `labels.topLogprobs` provides it; teacher and student must have the same tokenizer. Labels without log-probabilities, or whose text
    tokenises differently for the student, are learned by cross-entropy and counted."""
    lora: Lora | None = None
    """Train low-rank adapters instead of all weights: a fraction of the memory, and one server can hold every round's student."""
    label_weights: LabelWeights = LabelWeights()
    """Weight of a label's tokens in the loss; the paper's recipe weights all equally."""
    micro_batch_tokens: Annotated[int, Field(ge=64, le=8388608)] = 65536
    """Maximum tokens, including padding, of one forward pass on one rank, or on `sequenceParallel` ranks; affects memory, not the
    result."""
    max_sequence_tokens: Annotated[int, Field(ge=64, le=1048576)] = 65536
    """Maximum tokens of a state with its label; longer ones are left out and counted."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-6
    """Peak learning rate of AdamW."""
    learning_rate_schedule: LearningRateSchedule = LearningRateSchedule.CONSTANT
    """Schedule of the learning rate after warm-up."""
    min_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final learning rate of Linear and Cosine, as a fraction of the peak."""
    warmup_steps: Annotated[int, Field(ge=0, le=1000000)] = 0
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    gradient_clip: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Maximum global gradient norm."""
    precision: Precision = Precision.BF16
    """Arithmetic of forward and backward passes; the optimiser always keeps FP32 master weights."""
    deepspeed: DeepSpeed = DeepSpeed()
    """Sharding over ranks."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: only the input of each layer is kept, at the cost of a third more floating-point
    operations."""
    sequence_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Ranks that share each row of tokens (DeepSpeed-Ulysses), for contexts that are too long for one rank; must divide the student's
    heads."""
    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of training pods."""
    processes_per_node: Annotated[int, Field(ge=1, le=64)] = 8
    """Ranks in each pod; must equal `gpusPerNode` if that is above 0."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 8
    """GPUs of each pod; 0 trains on the CPU."""
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=1000000)] = 50
    """Steps between checkpoints, from which a killed Job resumes."""
    termination_grace_period_seconds: Annotated[int, Field(ge=30, le=3600)] = 120
    """Seconds that a training pod has between SIGTERM and SIGKILL to store a checkpoint. On a spot node the cloud may give it fewer."""
    retries: Annotated[int, Field(ge=0, le=100)] = 6
    """Retries of a training that failed by itself. Its nodes end together, and count as one."""
    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Trainer image; defaults to the operator's setting, an image of its own release. Not used on a single machine without containers."""
    pod: PodSettings = PodSettings()
    """Scheduling, resources and environment of the training pods; on a single machine without a cluster only the environment is used."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.steps is not None:
            self.steps.refuse_outside("steps", 1, MOST_STEPS, _STEPS)
        if self.gpus_per_node not in (0, self.processes_per_node):
            raise Misfit(
                "processesPerNode", self.processes_per_node, f"write {self.gpus_per_node} as in gpusPerNode, or gpusPerNode 0 for the CPU"
            )
        if self.processes_per_node % self.sequence_parallel:
            raise Misfit("sequenceParallel", self.sequence_parallel, _ROWS_STAY_ON_A_NODE)
        return self
