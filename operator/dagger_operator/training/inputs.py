"""The inputs of a round's training."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagger_operator.api import Aggregation
from dagger_operator.store.manifest import TrainingSet, training_set
from dagger_operator.store.results import PrepareResult, TrainingResult, read_result
from dagger_operator.store.stage import Stage, StageFailure

_NO_MATTER = frozenset({"checkpointEverySteps", "terminationGracePeriodSeconds", "retries", "image", "mode", "pod"})
"""Settings that cannot change the result."""
_ROUNDING = frozenset(
    {"nodes", "processesPerNode", "gpusPerNode", "sequenceParallel", "microBatchTokens", "packing", "activationCheckpointing", "deepspeed"}
)
"""Settings that change only the order of summation, and may be changed during training: to use fewer nodes, or less memory."""


@dataclass(frozen=True)
class Inputs:
    parent: str
    """Policy version that training starts from."""
    base: str
    """Version whose weights are loaded: the parent or, with `training.lora`, the run's first, to which all adapters belong."""
    data: TrainingSet

    def settings(self, stage: Stage) -> dict[str, Any]:
        """Return everything that decides the result, in the form stored with the policy."""
        spec = stage.run.spec
        training = {name: value for name, value in spec.training.wire().items() if name not in _NO_MATTER}
        return {"training": training, "seed": spec.seed, "round": stage.round, "parent": self.parent, "data": self.data.digest}

    @property
    def adapted(self) -> bool:
        """Whether the parent's adapter is trained further."""
        return self.parent != self.base

    def course(self, stage: Stage) -> dict[str, Any]:
        """Return the part of the settings that decides more than rounding: a checkpoint must agree with it to be resumed."""
        settings = self.settings(stage)
        training = {name: value for name, value in settings["training"].items() if name not in _ROUNDING}
        return {**settings, "training": training}


async def inputs(stage: Stage) -> Inputs:
    """Read the round's inputs. Raises `StageFailure` if the earlier stages have not produced them."""
    spec = stage.run.spec
    data = await training_set(stage.store, stage.round, spec.training.aggregation)
    if sum(manifest.labels for manifest in data.manifests) == 0:
        raise StageFailure(
            "NoLabels",
            f"round {stage.round} has no label to train on ({sum(m.turns for m in data.manifests)} turns): look at label_flaw in its "
            "trajectories, and at scaffold.protocol and teacher.sampling.maxTokens",
        )
    prepared = await read_result(stage.store, 0, PrepareResult)
    previous = await read_result(stage.store, stage.round - 1, TrainingResult) if stage.round > 1 else None
    if prepared is None or (stage.round > 1 and previous is None):
        before = "the run's prepare stage" if prepared is None else f"the training stage of round {stage.round - 1}"
        raise StageFailure("StageMissing", f"{before} has no result in the store: it has to end before this one starts", permanent=False)
    fresh = previous is None or spec.training.aggregation is Aggregation.ALL_ROUNDS_FROM_BASE
    parent = prepared.policy if fresh or previous is None else previous.policy
    return Inputs(parent=parent, base=prepared.policy if spec.training.lora else parent, data=data)


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def weights_folder(scratch: Path, version: str) -> Path:
    """Return where the stage puts the weights that its ranks start from."""
    return scratch / "weights" / version


def adapter_folder(scratch: Path, version: str) -> Path:
    """Return where the stage puts the adapter to train further."""
    return scratch / "adapters" / version
