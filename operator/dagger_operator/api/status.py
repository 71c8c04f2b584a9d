"""What a run reports: derived from what is observed, written once, bounded in size."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from dagger_operator.api.model import ApiModel, list_map


class Phase(StrEnum):
    """One word for people; programs read conditions."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    PREFLIGHT = "Preflight"
    ROLLOUT = "Rollout"
    TRAINING = "Training"
    PUBLISHING = "Publishing"
    EVALUATION = "Evaluation"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Condition(ApiModel):
    """The standard form of Kubernetes."""

    type: Annotated[str, Field(max_length=316)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(max_length=1024)]
    message: Annotated[str, Field(max_length=32768)] = ""
    observed_generation: int | None = None
    last_transition_time: datetime | None = None


class RolloutSummary(ApiModel):
    """What a round's rollouts delivered; the numbers of `RolloutResult` that people look at."""

    rollouts: int
    """Rollouts that ended, infrastructure failures included."""
    outcomes: dict[str, int] = {}
    """Rollouts by outcome."""
    turns: int
    labels: int
    """Labels that can be trained on."""
    label_coverage: float
    """Share of visited states with such a label."""
    nominal_beta: float | None = None
    teacher_turn_share: float
    """Share of turns in which the teacher acted: the delivered mix."""
    teacher_token_share: float
    """Share of completion tokens that came from the teacher's actions."""
    agreement: float | None = None
    """Share of the student's turns that equal the teacher's label."""
    data_digest: str
    """Digest of the round's aggregated data set."""
    seconds: float


class TrainingSummary(ApiModel):
    steps: int
    labels: int
    """Labels that were trained on, each counted as often as it was."""
    tokens: int
    """Tokens of all forward passes, padding left out."""
    token_ratio: float = 1.0
    """Tokens that one sequence for each label would have cost, by `tokens`."""
    too_long: int = 0
    """Labelled states left out because they exceed maxSequenceTokens."""
    hard_labels: int = 0
    """Labels of the training set that ForwardKL had to learn as hard targets."""
    first_loss: float | None = None
    """Mean over the first ten steps."""
    last_loss: float | None = None
    """Mean over the last ten steps."""
    checkpoint: str
    """Policy version that training made."""
    seconds: float


class EvaluationSummary(ApiModel):
    policy: str
    tasks: int
    """Tasks graded; infrastructure failures are excluded and counted apart."""
    resolved: int
    resolved_rate: float
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]
    false_submits: int
    """Rollouts that were submitted as done and are not resolved."""
    infrastructure_failures: int = 0
    seconds: float


class RoundStatus(ApiModel):
    """One round; round 0 is the evaluation of the initial student."""

    round: Annotated[int, Field(ge=0)]
    policy: str | None = None
    """Policy version that acted as student in this round."""
    rollout: RolloutSummary | None = None
    training: TrainingSummary | None = None
    evaluation: EvaluationSummary | None = None


class Progress(ApiModel):
    """How far the stage at work is."""

    stage: str
    """Such as `rollout`."""
    done: int
    total: int
    unit: str
    """What is counted, such as `rollouts` or `steps`."""
    percent: int
    estimated_completion_time: datetime | None = None
    """When this stage ends if it goes on as it has so far."""


class RunStatus(ApiModel):
    observed_generation: int | None = None
    phase: Phase = Phase.PENDING
    round: int = 0
    reason: str = ""
    """The reason of the condition that stands in the way, or of the end."""
    conditions: Annotated[list[Condition], Field(max_length=32, json_schema_extra=list_map("type"))] = []
    rounds: Annotated[list[RoundStatus], Field(max_length=100, json_schema_extra=list_map("round"))] = []
    """The last rounds; all of them are in storage."""
    resolved: str | None = None
    """Resolved rate of the newest evaluation, as a percentage."""
    teacher_share: str | None = None
    """The teacher's share of turns in the newest round, as a percentage."""
    progress: Progress | None = None
    """The stage at work, as its workers report it; refreshed by whole percents."""
    gpu_hours: str | None = None
    """GPU-hours by the seconds that finished stages took and the GPUs held meanwhile, with those of the stage at work."""
    start_time: datetime | None = None
    estimated_completion_time: datetime | None = None
    """When the run ends if the rounds left take as long as the newest one; absent before a round is done."""
    completion_time: datetime | None = None
