"""Host resources of a training node and a serving pod: memory, and disk (ephemeral storage)."""

from collections.abc import Iterator
from dataclasses import dataclass

from dagger_operator.api import Resources, Serving, Training
from dagger_operator.estimate.finding import Finding
from dagger_operator.estimate.hardware import GIB
from dagger_operator.estimate.memory import Memory, Setup
from dagger_operator.estimate.models import Shape

PROCESS = 4 * GIB
"""Bytes of a process that uses a GPU: libraries, CUDA's host side, pinned buffers. No source: an assumption."""
OTHER = 4 * GIB
"""Bytes on disk of compiled kernels, logs, temporary files. No source: an assumption."""
STORED = 2
"""Bytes of a stored parameter: BF16, as in the paper's models."""
TOKEN = 4
"""Bytes of a label's token in the trainer (`training/strand.py`)."""


@dataclass(frozen=True)
class TrainingNode:
    """Bytes of the fullest node of a training, by part."""

    processes: float
    labels: float
    """Every rank holds all labels, and of each label's state only what the state before it lacks."""
    loading: float
    """Every rank loads the whole weights before DeepSpeed shards them, all at the same time. An upper bound: pages of a file of the same
    dtype may be shared."""
    offloaded: float
    gathered: float
    """The trained weights on rank 0, in FP32 and in the stored dtype."""
    weights: float
    """On disk, like the fields below: the student that training starts from."""
    checkpoint: float
    """What a node writes of a checkpoint, or reads to resume from it: its ranks' files and the first node's."""
    export: float
    other: float
    whole_checkpoint: float
    """The checkpoint of all nodes."""

    @property
    def memory(self) -> float:
        """Bytes of memory at the fullest of three moments: labels are exchanged, weights are loaded, trained weights are gathered."""
        return self.processes + self.labels + max(self.labels, self.loading, self.offloaded + self.gathered)

    @property
    def disk(self) -> float:
        """Bytes of disk: a checkpoint is deleted locally before the student is written."""
        return self.weights + max(self.checkpoint, self.export) + self.other

    @property
    def disk_cut_anew(self) -> float:
        """Bytes of disk to resume with another number of ranks: every node has the checkpoint, its pieces, and the reassembled whole
        (`deepspeed/checkpoint/ds_to_universal.py`, 0.19)."""
        return self.weights + 3 * self.whole_checkpoint + self.other


@dataclass(frozen=True)
class ServingPod:
    """Bytes of one pod of a policy, by part. Weights pass through the page cache, which the kernel can reclaim."""

    processes: float
    weights: float
    """On disk: two versions of a student, as the next one is loaded while the old one serves; none of a folder, which is read in place."""
    other: float

    @property
    def memory(self) -> float:
        return self.processes

    @property
    def disk(self) -> float:
        return self.weights + self.other


Need = TrainingNode | ServingPod


def training_node(shape: Shape, training: Training, memory: Memory, label_tokens: float) -> TrainingNode:
    """Return the needs of a node. `memory` is that of a rank, `label_tokens` the tokens held for all labels of the largest round."""
    setup, ranks, nodes = Setup.of(training), training.processes_per_node, training.nodes
    adapters = shape.adapters(setup.adapter_rank)
    trained = adapters or shape.parameters
    # FP32 weights and both of Adam's moments: sharded over the ranks, except for what each rank holds whole.
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
    """Return the needs of a pod: a process per GPU, vLLM's engine and its HTTP server; `versions` of the weights are on disk at a time."""
    return ServingPod(processes=(serving.gpus + 2) * PROCESS, weights=versions * STORED * shape.parameters, other=OTHER)


def is_folder(model: str) -> bool:
    """Whether a `model` is a path, of which a server makes no copy."""
    return model.startswith(("/", ".", "~", "file://"))


def too_little(field: str, given: Resources, need: Need) -> Iterator[Finding]:
    """Report requests and limits below what is needed. A request alone is not a limit: a node may have more."""
    for name, size in (("memory", need.memory), ("ephemeral-storage", need.disk)):
        for kind, amounts, why in (
            ("requests", given.requests, "less than it takes, so it may come to a node that has no more"),
            ("limits", given.limits, "less than it takes, and the pod is ended where it exceeds that"),
        ):
            if name in amounts and amount(amounts[name]) < size:
                found = f"{why}: {size / GIB:.0f} GiB by estimate"
                yield Finding(f"{field}.{kind}.{name}", amounts[name], found, f"write {whole_gib(size)}", fatal=kind == "limits")


def whole_gib(size: float) -> str:
    """Return at least this many bytes in the notation of Kubernetes."""
    return f"{-(-size // GIB):.0f}Gi"


_SUFFIXES = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}


def amount(quantity: str) -> float:
    """Return the value of a Kubernetes quantity such as `16Gi`."""
    digits = quantity.rstrip("".join(_SUFFIXES))
    return float(digits) * _SUFFIXES.get(quantity.removeprefix(digits), 1.0)
