"""The resource itself, and the one function that loads it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import takewhile
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from dagger_operator.api.errors import explain
from dagger_operator.api.evaluation import Evaluation
from dagger_operator.api.failure import FailurePolicy
from dagger_operator.api.mixing import Mixing
from dagger_operator.api.model import ApiModel, Misfit, Rule
from dagger_operator.api.pods import Label
from dagger_operator.api.policies import Role, Student, Teacher
from dagger_operator.api.rollouts import Labels, Protocol, Rollouts, Sandbox, Scaffold
from dagger_operator.api.status import RunStatus
from dagger_operator.api.storage import Storage
from dagger_operator.api.tasks import Tasks
from dagger_operator.api.training import Loss, Training, TrainingMode

GROUP = "dagger-operator.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "DAggerRun"


DEFAULT_MANAGER = f"{GROUP}/operator"
"""`managedBy` of the runs that this operator manages."""


class GpuSharing(StrEnum):
    DEDICATED = "Dedicated"
    TIME_SHARED = "TimeShared"


@dataclass(frozen=True)
class Immutable:
    """A field that may not change once a run exists, because finished rounds depend on it."""

    field: str
    """Path below the spec; `?` marks parts that may be absent."""
    why: str

    @property
    def name(self) -> str:
        return self.field.replace("?", "")

    @property
    def message(self) -> str:
        return f"{self.name} is immutable, {self.why}: make a new run with a new name"

    def rule(self) -> Rule:
        same = f"self.{self.name} == oldSelf.{self.name}"
        if "?" in self.field:
            # Not with `orValue`: the API server cannot bound its cost.
            here, before = self._given("self"), self._given("oldSelf")
            same = f"(({here}) == ({before}) && (!({here}) || {same}))"
        # An older version of the CRD may have stored a run without the field. If a rule cannot be evaluated, the API server refuses every
        # write to such a run, even one of its status.
        return Rule(" || ".join([*(f"!has(oldSelf.{path})" for path in self._required()), same]), self.message)

    def _required(self) -> list[str]:
        """Return the paths that lead to the field, up to the first optional part."""
        parts = list(takewhile(lambda part: not part.startswith("?"), self.field.split(".")))
        return [".".join(parts[: end + 1]) for end in range(len(parts))]

    def _given(self, whose: str) -> str:
        parts = self.field.split(".")
        optional = (".".join(parts[: end + 1]).replace("?", "") for end, part in enumerate(parts) if part.startswith("?"))
        return " && ".join(f"has({whose}.{path})" for path in optional)

    def of(self, spec: "RunSpec") -> Any:
        found: Any = spec.wire()
        for part in self.name.split("."):
            found = found.get(part) if found is not None else None
        return found


IMMUTABLE = (
    Immutable("seed", "coins and task order of finished rounds come from it"),
    Immutable("mixing", "finished rounds were mixed by it"),
    Immutable("student.model", "it is what every round started from"),
    Immutable("student.?endpoint.?url", "it is who acted in finished rounds"),
    Immutable("student.?endpoint.?model", "it is who acted in finished rounds"),
    Immutable("teacher.model", "labels of two teachers would stand in one data set"),
    Immutable("teacher.?endpoint.?model", "labels of two teachers would stand in one data set"),
    # All but `imagePrefix`, which determines where images are pulled from, not what is in them.
    *(
        Immutable(f"tasks.{field}", "finished rounds were dealt by it")
        for field in ("source", "perRound", "?firstRound", "rolloutsPerTask", "heldOut")
    ),
    Immutable("scaffold", "finished trajectories were made with it"),
    Immutable("training.mode", "rounds with and without training do not make one run"),
    Immutable("training.?lora", "each round's adapter continues the one before it"),
    Immutable("storage.url", "everything that is finished lies there"),
    Immutable("managedBy", "two controllers would work on one run"),
)


class Kueue(ApiModel):
    """How Kueue admits the run's Jobs and servers."""

    queue_name: Label
    """LocalQueue in the run's namespace."""
    priority_class: Label | None = None
    """WorkloadPriorityClass."""


SPEC_BYTES = 96 * 1024
"""Maximum bytes of a spec as JSON: stages receive it in an environment variable, and Linux allows 128 KiB in one."""
_TRAINED_ENDPOINT = "a student behind an endpoint cannot be trained here: set training.mode to Disabled, or serve the student"
_UNTOLD = "ForwardKL learns the teacher's log-probabilities: write labels.topLogprobs, such as 8, or training.loss CrossEntropy"
_NO_PARSER = "the ToolCall protocol needs toolCallParser, such as 'hermes' for Qwen3, wherever a policy is served here"


class RunSpec(ApiModel):
    """The desired state of the run."""

    cel: ClassVar[tuple[Rule, ...]] = (
        # These rules hold if a policy is missing: that is reported separately, and a rule that cannot be evaluated refuses every write.
        Rule("!has(self.student) || !has(self.student.endpoint) || self.training.mode == 'Disabled'", _TRAINED_ENDPOINT),
        Rule(
            "self.scaffold.protocol != 'ToolCall' || !has(self.student) || !has(self.teacher) || "
            "((has(self.student.endpoint) || (has(self.student.serving) && has(self.student.serving.toolCallParser))) && "
            "(!has(self.teacher.serving) || has(self.teacher.serving.toolCallParser)))",
            _NO_PARSER,
        ),
        Rule("!has(self.training.loss) || self.training.loss != 'ForwardKL' || self.labels.topLogprobs > 0", _UNTOLD),
        *(immutable.rule() for immutable in IMMUTABLE),
    )

    rounds: Annotated[int, Field(ge=1, le=1000)] = 5
    """Number of rounds of rollout, training and evaluation. It may be raised later."""
    seed: Annotated[int, Field(ge=0, le=2**53 - 1)] = 0
    """Determines the task order and every random decision: the same seed gives the same ones."""
    mixing: Mixing = Mixing()
    """Who acts in a turn."""
    student: Student
    """The policy that learns."""
    teacher: Teacher
    """The policy that labels."""
    tasks: Tasks
    """The tasks that agents work on."""
    scaffold: Scaffold = Scaffold()
    """The agent program."""
    sandbox: Sandbox = Sandbox()
    """Where the agent's commands run."""
    labels: Labels = Labels()
    """How labels are collected."""
    rollouts: Rollouts = Rollouts()
    """Workers and their budgets."""
    training: Training = Training()
    """How labels become the next student."""
    evaluation: Evaluation = Evaluation()
    """How students are evaluated."""
    storage: Storage
    """Where all data of the run is kept."""
    gpu_sharing: GpuSharing = GpuSharing.DEDICATED
    """Dedicated: serving and training hold separate GPUs. TimeShared: serving scales to zero while training holds the GPUs."""
    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Image of every stage but training, and of the containers beside vLLM; defaults to the operator's setting, an image of its own
    release. Not used on a single machine without containers."""
    kueue: Kueue | None = None
    """Let Kueue admit the run's Jobs and servers. A Job, or a group of several nodes, starts once its queue has room for all of its pods;
    other servers are admitted replica by replica, so give the queue room for all replicas of a run."""
    failure_policy: FailurePolicy = FailurePolicy()
    """Which failures are retried, and what is kept of a failed run."""
    managed_by: Annotated[str, Field(min_length=1, max_length=253)] = DEFAULT_MANAGER
    """The controller that manages the run; an operator ignores a run that names another one."""
    suspend: bool = False
    """Stop all stages and free their resources; finished work is kept, and the run resumes when this is false again."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Fail the run if it is not done this many seconds after `status.startTime`, including suspended time."""
    pre_running_deadline_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Fail the run if a stage or server has waited this many seconds without running, and report the reason for the wait; time in a queue
    (Kueue) does not count. By default it waits forever."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Delete the resource this many seconds after it finished; data in storage is kept."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.student.endpoint and self.training.mode is not TrainingMode.DISABLED:
            raise Misfit("training.mode", self.training.mode.value, _TRAINED_ENDPOINT)
        if self.training.loss is Loss.FORWARD_KL and not self.labels.top_logprobs:
            raise Misfit("labels.topLogprobs", self.labels.top_logprobs, _UNTOLD)
        if self.scaffold.protocol is Protocol.TOOL_CALL:
            for role, serving in ((Role.STUDENT, self.student.served), (Role.TEACHER, self.teacher.serving)):
                if serving is not None and serving.tool_call_parser is None:
                    raise Misfit(f"{role}.serving.toolCallParser", None, _NO_PARSER)
        return self

    @model_validator(mode="after")
    def _fits_into_an_environment_variable(self) -> Self:
        size = len(json.dumps(self.wire(), ensure_ascii=False, separators=(",", ":")).encode())
        if size > SPEC_BYTES:
            raise Misfit("", f"{size} bytes as JSON", f"write at most {SPEC_BYTES}: shorten templates, commands, arguments or environment")
        return self


NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
LONGEST_NAME = 32


class Metadata(ApiModel):
    """The part of ObjectMeta that this project reads; the rest passes through."""

    model_config = {**ApiModel.model_config, "extra": "allow"}

    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=LONGEST_NAME)]
    """DNS label that starts with a letter; at most 32 characters, so that the host names of its children fit into 63."""
    namespace: Annotated[str, Field(max_length=63)] = "default"
    uid: str | None = None
    generation: int | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class DAggerRun(ApiModel):
    """One DAgger training run: a student learns from a teacher over rounds of rollouts, labels, training and evaluation."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"size(self.metadata.name) <= {LONGEST_NAME} && self.metadata.name.matches('{NAME_PATTERN}')",
            f"write a name of at most {LONGEST_NAME} lower-case letters, digits and hyphens that starts with a letter",
        ),
    )

    api_version: Literal["dagger-operator.dev/v1alpha1"] = "dagger-operator.dev/v1alpha1"
    kind: Literal["DAggerRun"] = "DAggerRun"
    metadata: Metadata
    spec: RunSpec
    status: RunStatus | None = None


def load(document: Mapping[str, Any]) -> DAggerRun:
    """Validate a parsed document as strictly as an API server does: a quoted number is not a number, and null means not given.

    Raises `InvalidRun` with every problem found: field, value, remedy.
    """
    try:
        return DAggerRun.model_validate_json(json.dumps(_without_nulls(document), default=str), strict=True)
    except ValidationError as error:
        raise explain(error, DAggerRun) from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        # JSON keys are strings or numbers only; YAML reads some keys as dates.
        pairs = ((key if isinstance(key, str | int | float) else str(key), inner) for key, inner in value.items())
        return {key: _without_nulls(inner) for key, inner in pairs if inner is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def refused_edits(old: RunSpec, new: RunSpec) -> list[str]:
    """Return the messages of the CRD's transition rules that an edit violates, for runtimes without an API server."""
    return [f"spec.{immutable.message}" for immutable in IMMUTABLE if immutable.of(old) != immutable.of(new)]
