"""The `DAggerRun` resource as pydantic models: the one source of the CRD, its defaults, its bounds and its docs.

Nothing here does I/O. `load` turns a parsed YAML document into a validated `DAggerRun` or raises `InvalidRun`, whose
problems each name the field, the value and the remedy.
"""

from dagger_operator.api.errors import InvalidRun, Problem
from dagger_operator.api.evaluation import Evaluation, Overlap
from dagger_operator.api.failure import FailureAction, FailurePolicy, FailureRule, Keep, RunStage
from dagger_operator.api.mixing import Mixing, MixingStrategy, Schedule, ScheduleType
from dagger_operator.api.pods import ClaimMount, LocalReference, PodSettings, Resources, SandboxPod, Toleration
from dagger_operator.api.policies import Endpoint, MaxTokensParameter, Role, Sampling, SecretKeyRef, Serving, Student, Teacher
from dagger_operator.api.rollouts import (
    LabelMode,
    Labels,
    Protocol,
    Rollouts,
    Sandbox,
    SandboxBackend,
    SandboxLimits,
    Scaffold,
    ScaffoldType,
)
from dagger_operator.api.run import (
    API_VERSION,
    DEFAULT_MANAGER,
    GROUP,
    KIND,
    VERSION,
    DAggerRun,
    GpuSharing,
    Kueue,
    Metadata,
    RunSpec,
    load,
)
from dagger_operator.api.status import (
    Condition,
    EvaluationSummary,
    Phase,
    Progress,
    RolloutSummary,
    RoundStatus,
    RunStatus,
    TrainingSummary,
)
from dagger_operator.api.storage import Storage
from dagger_operator.api.tasks import HeldOut, SourceType, Tasks, TaskSource
from dagger_operator.api.training import Aggregation, BatchUnit, DeepSpeed, Lora, Training, TrainingMode

__all__ = [
    "API_VERSION",
    "DEFAULT_MANAGER",
    "GROUP",
    "KIND",
    "VERSION",
    "Aggregation",
    "BatchUnit",
    "ClaimMount",
    "Condition",
    "DAggerRun",
    "DeepSpeed",
    "Endpoint",
    "Evaluation",
    "EvaluationSummary",
    "FailureAction",
    "FailurePolicy",
    "FailureRule",
    "GpuSharing",
    "HeldOut",
    "InvalidRun",
    "Keep",
    "Kueue",
    "LabelMode",
    "Labels",
    "LocalReference",
    "Lora",
    "MaxTokensParameter",
    "Metadata",
    "Mixing",
    "MixingStrategy",
    "Overlap",
    "Phase",
    "PodSettings",
    "Problem",
    "Progress",
    "Protocol",
    "Resources",
    "Role",
    "RolloutSummary",
    "Rollouts",
    "RoundStatus",
    "RunSpec",
    "RunStage",
    "RunStatus",
    "Sampling",
    "Sandbox",
    "SandboxBackend",
    "SandboxLimits",
    "SandboxPod",
    "Scaffold",
    "ScaffoldType",
    "Schedule",
    "ScheduleType",
    "SecretKeyRef",
    "Serving",
    "SourceType",
    "Storage",
    "Student",
    "TaskSource",
    "Tasks",
    "Teacher",
    "Toleration",
    "Training",
    "TrainingMode",
    "TrainingSummary",
    "load",
]
