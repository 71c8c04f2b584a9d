"""The resource itself, and the one way to load it."""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from dagger_operator.api.errors import explain
from dagger_operator.api.evaluation import Evaluation
from dagger_operator.api.mixing import Mixing
from dagger_operator.api.model import ApiModel, Rule
from dagger_operator.api.policies import Student, Teacher
from dagger_operator.api.rollouts import Labels, Protocol, Rollouts, Sandbox, Scaffold
from dagger_operator.api.status import RunStatus
from dagger_operator.api.storage import Storage
from dagger_operator.api.tasks import Tasks
from dagger_operator.api.training import Training, TrainingMode

GROUP = "dagger-operator.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "DAggerRun"


class GpuSharing(StrEnum):
    DEDICATED = "Dedicated"
    TIME_SHARED = "TimeShared"


class RunSpec(ApiModel):
    """What should be done."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.student.endpoint) || (has(self.training) && has(self.training.mode) && self.training.mode == 'Disabled')",
            "a student behind an endpoint cannot be trained here: set training.mode to Disabled, or serve the student",
        ),
        Rule("self.seed == oldSelf.seed", "seed is immutable: coins and task order of finished rounds depend on it; make a new run"),
        Rule("self.mixing == oldSelf.mixing", "mixing is immutable: finished rounds were mixed by it; make a new run"),
        Rule("self.student.model == oldSelf.student.model", "student.model is immutable; make a new run"),
        Rule(
            "self.teacher.model == oldSelf.teacher.model",
            "teacher.model is immutable: labels of two teachers in one data set; make a new run",
        ),
        Rule("self.tasks == oldSelf.tasks", "tasks is immutable; make a new run"),
        Rule("self.scaffold == oldSelf.scaffold", "scaffold is immutable; make a new run"),
        Rule("self.storage.url == oldSelf.storage.url", "storage.url is immutable; make a new run"),
    )

    rounds: Annotated[int, Field(ge=1, le=1000)] = 5
    """Rounds of rollout, training and evaluation. It may be raised later."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Decides task order and every coin: the same seed decides the same."""
    mixing: Mixing = Mixing()
    """Who acts in a turn."""
    student: Student
    """The policy that learns."""
    teacher: Teacher
    """The policy that labels."""
    tasks: Tasks
    """What agents work on."""
    scaffold: Scaffold = Scaffold()
    """The agent program."""
    sandbox: Sandbox = Sandbox()
    """Where its commands run."""
    labels: Labels = Labels()
    """How labels are gathered."""
    rollouts: Rollouts = Rollouts()
    """Workers and their budgets."""
    training: Training = Training()
    """How labels become the next student."""
    evaluation: Evaluation = Evaluation()
    """How students are measured."""
    storage: Storage
    """Where everything is kept."""
    gpu_sharing: GpuSharing = GpuSharing.DEDICATED
    """TimeShared: serving scales to zero while training holds the GPUs."""
    image: Annotated[str, Field(min_length=1, max_length=512)] = "dagger-operator/worker:0.1.0"
    """Image of every stage but training, and of what runs beside vLLM; not used on one machine without containers."""
    suspend: bool = False
    """Stop all stages and free their resources; finished work is kept and the run goes on when this is false again."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Delete the resource this long after it finished; data in storage stays."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.student.endpoint and self.training.mode is not TrainingMode.DISABLED:
            raise ValueError("a student behind an endpoint cannot be trained here: set training.mode to Disabled, or serve the student")
        if self.scaffold.protocol is Protocol.TOOL_CALL:
            for role, serving in (("student", self.student.served), ("teacher", self.teacher.serving)):
                if serving is not None and serving.tool_call_parser is None:
                    raise ValueError(f"the ToolCall protocol needs {role}.serving.toolCallParser, such as 'hermes' for Qwen3")
        return self


class Metadata(ApiModel):
    """The part of ObjectMeta that this project reads; the rest passes through."""

    model_config = {**ApiModel.model_config, "extra": "allow"}

    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=32)]
    """DNS label that starts with a letter; at most 32 characters, so that the host names of its children fit into 63."""
    namespace: Annotated[str, Field(max_length=63)] = "default"
    uid: str | None = None
    generation: int | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class DAggerRun(ApiModel):
    """One DAgger training run."""

    api_version: Literal["dagger-operator.dev/v1alpha1"] = "dagger-operator.dev/v1alpha1"
    kind: Literal["DAggerRun"] = "DAggerRun"
    metadata: Metadata
    spec: RunSpec
    status: RunStatus | None = None


def load(document: Mapping[str, Any]) -> DAggerRun:
    """Validates a parsed document.

    Raises `InvalidRun` with every problem found: field, value, remedy.
    """
    try:
        return DAggerRun.model_validate(document)
    except ValidationError as error:
        raise explain(error, DAggerRun) from None


def refused_edits(old: RunSpec, new: RunSpec) -> list[str]:
    """What an edit of a started run may not change: the messages of the CRD's transition rules, for runtimes without an API server."""
    changed = {
        "seed": old.seed != new.seed,
        "mixing": old.mixing != new.mixing,
        "student.model": old.student.model != new.student.model,
        "teacher.model": old.teacher.model != new.teacher.model,
        "tasks": old.tasks != new.tasks,
        "scaffold": old.scaffold != new.scaffold,
        "storage.url": old.storage.url != new.storage.url,
    }
    return [f"spec.{field} is immutable once a run exists: make a new run with a new name" for field, differs in changed.items() if differs]
