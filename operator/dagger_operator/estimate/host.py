"""What a training node and a serving pod take beside GPUs: host memory, and disk (ephemeral storage)."""

from collections.abc import Iterator
from dataclasses import dataclass

from dagger_operator.api import Resources, Serving, Training
from dagger_operator.estimate.finding import Finding
from dagger_operator.estimate.hardware import GIB
from dagger_operator.estimate.memory import Memory, Setup
from dagger_operator.estimate.models import Shape

PROCESS = 4 * GIB
"""Of a process that works on a GPU: libraries, CUDA's host side, pinned buffers. No source: an assumption."""
OTHER = 4 * GIB
"""On disk: kernels that are compiled there, logs, temporary files. No source: an assumption."""
STORED = 2
"""Bytes of a stored parameter: BF16, as the paper's models have it."""
TOKEN = 4
"""Bytes of a label's token in the trainer (`training/strand.py`)."""


@dataclass(frozen=True)
class TrainingNode:
    """Bytes of the fullest node of a training, by part."""

    processes: float
    labels: float
    """Every rank holds all labels, and of each one's state what the state before it has not."""
    loading: float
    """Every rank loads the weights whole before DeepSpeed shares them out, all at the same time. At most: pages of a file in the same
    type may be shared."""
    offloaded: float
    gathered: float
    """The trained weights on rank 0, in FP32 and in the type in which they are stored."""
    weights: float
    """On disk, from here on: the student that training starts from."""
    checkpoint: float
    """What a node writes of one, or reads to go on from it: its ranks' files and the first node's."""
    export: float
    other: float
    whole_checkpoint: float
    """Of all nodes."""

    @property
    def memory(self) -> float:
        """At the fullest of three moments: labels are exchanged, weights are loaded, trained weights are gathered."""
        return self.processes + self.labels + max(self.labels, self.loading, self.offloaded + self.gathered)

    @property
    def disk(self) -> float:
        """A checkpoint is gone before the student is written."""
        return self.weights + max(self.checkpoint, self.export) + self.other

    @property
    def disk_cut_anew(self) -> float:
        """Where training goes on with another number of ranks: every node has the checkpoint, its pieces, and what is put together of
        them (`deepspeed/checkpoint/ds_to_universal.py`, 0.19)."""
        return self.weights + 3 * self.whole_checkpoint + self.other


@dataclass(frozen=True)
class ServingPod:
    """Bytes of one pod of a policy, by part. Weights go through the page cache, which the kernel takes back."""

    processes: float
    weights: float
    """On disk: of a student two versions, as the next one comes while the old one answers; of a folder none, it is read in its place."""
    other: float

    @property
    def memory(self) -> float:
        return self.processes

    @property
    def disk(self) -> float:
        return self.weights + self.other


Need = TrainingNode | ServingPod


def training_node(shape: Shape, training: Training, memory: Memory, label_tokens: float) -> TrainingNode:
    """`memory` is that of a rank, `label_tokens` what is held of all labels of the largest round."""
    setup, ranks, nodes = Setup.of(training), training.processes_per_node, training.nodes
    adapters = shape.adapters(setup.adapter_rank)
    trained = adapters or shape.parameters
    # FP32 weights and both of Adam's moments: dealt out to ranks, but for what each has whole.
    dealt, first = 12 * trained, 0.0
    if setup.stage in (1, 2):
        first = (2 if setup.bf16 else 4) * trained
    elif setup.stage == 0:
        dealt, first = 0, 12 * trained
    return TrainingNode(
        processes=ranks * PROCESS,
        labels=ranks * TOKEN * label_tokens,
        loading=ranks * shape.parameters * (2 if setup.bf16 and setup.stage else 4),
        offloaded=ranks * memory.host,
        gathered=4 * trained + STORED * shape.parameters,
        weights=STORED * shape.parameters + 4 * adapters,
        checkpoint=min(2, nodes) * dealt / nodes + first,
        export=STORED * shape.parameters + 4 * adapters,
        other=OTHER,
        whole_checkpoint=dealt + first,
    )


def serving_pod(shape: Shape, serving: Serving, versions: int) -> ServingPod:
    """A process for each GPU, vLLM's engine and its HTTP server; so many versions of the weights are on its disk at a time."""
    return ServingPod(processes=(serving.gpus + 2) * PROCESS, weights=versions * STORED * shape.parameters, other=OTHER)


def is_folder(model: str) -> bool:
    """Whether a `model` is a path, of which a server copies nothing."""
    return model.startswith(("/", ".", "~", "file://"))


def too_little(field: str, given: Resources, need: Need) -> Iterator[Finding]:
    """Of what the spec sets aside or allows, what is less than is needed. A request alone is no limit: a node may have more."""
    for name, size in (("memory", need.memory), ("ephemeral-storage", need.disk)):
        for kind, amounts, why in (
            ("requests", given.requests, "less than it takes, so it may come to a node that has no more"),
            ("limits", given.limits, "less than it takes, and the pod is ended where it exceeds that"),
        ):
            if name in amounts and amount(amounts[name]) < size:
                found = f"{why}: {size / GIB:.0f} GiB by estimate"
                yield Finding(f"{field}.{kind}.{name}", amounts[name], found, f"write {whole_gib(size)}", fatal=kind == "limits")


def whole_gib(size: float) -> str:
    """At least so much, as Kubernetes writes it."""
    return f"{-(-size // GIB):.0f}Gi"


_SUFFIXES = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}


def amount(quantity: str) -> float:
    """What a quantity of Kubernetes says, such as `16Gi`."""
    digits = quantity.rstrip("".join(_SUFFIXES))
    return float(digits) * _SUFFIXES.get(quantity.removeprefix(digits), 1.0)
