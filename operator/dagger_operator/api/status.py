"""What a run reports: derived from observations, written in one place, bounded in size."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from dagger_operator.api.model import ApiModel, list_map


class Phase(StrEnum):
    """A one-word summary for people; programs read conditions."""

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
    """A condition in the standard form of Kubernetes."""

    type: Annotated[str, Field(max_length=316)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(max_length=1024)]
    message: Annotated[str, Field(max_length=32768)] = ""
    observed_generation: int | None = None
    last_transition_time: datetime | None = None


class RolloutSummary(ApiModel):
    """The result of a round's rollouts: the numbers of `RolloutResult` that people look at."""

    rollouts: int
    """Rollouts that ended, including infrastructure failures."""
    outcomes: dict[str, int] = {}
    """Rollouts by outcome."""
    turns: int
    labels: int
    """Labels that can be trained on."""
    label_coverage: float
    """Share of visited states with such a label."""
    nominal_beta: float | None = None
    teacher_turn_share: float
    """Share of turns in which the teacher acted: the actual mix."""
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
    """Labels trained on, each counted as often as it was used."""
    tokens: int
    """Tokens of all forward passes, without padding."""
    token_ratio: float = 1.0
    """Tokens that one sequence per label would have taken, divided by `tokens`."""
    too_long: int = 0
    """Labelled states left out because they exceed maxSequenceTokens."""
    hard_labels: int = 0
    """Labels of the training set that ForwardKL had to learn as hard targets."""
    first_loss: float | None = None
    """Mean over the first ten steps."""
    last_loss: float | None = None
    """Mean over the last ten steps."""
    checkpoint: str
    """Policy version that training produced."""
    seconds: float


class EvaluationSummary(ApiModel):
    policy: str
    tasks: int
    """Tasks graded; infrastructure failures are excluded and counted separately."""
    resolved: int
    resolved_rate: float
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]
    false_submits: int
    """Rollouts that were submitted as done but are not resolved."""
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
    """Progress of the current stage."""

    stage: str
    """Name of the stage, such as `rollout`."""
    done: int
    total: int
    unit: str
    """What is counted, such as `rollouts` or `steps`."""
    percent: int
    estimated_completion_time: datetime | None = None
    """When this stage ends if it continues at its rate so far."""


class RunStatus(ApiModel):
    observed_generation: int | None = None
    phase: Phase = Phase.PENDING
    round: int = 0
    reason: str = ""
    """Why the run is in its current state: the reason of the condition that blocks it, of its progress or of its end."""
    conditions: Annotated[list[Condition], Field(max_length=32, json_schema_extra=list_map("type"))] = []
    rounds: Annotated[list[RoundStatus], Field(max_length=100, json_schema_extra=list_map("round"))] = []
    """The latest rounds; storage has all of them."""
    resolved: str | None = None
    """Resolved rate of the latest evaluation, as a percentage."""
    teacher_share: str | None = None
    """The teacher's share of turns in the latest round, as a percentage."""
    progress: Progress | None = None
    """Progress of the current stage, as its workers report it; updated for every whole percent."""
    gpu_hours: str | None = None
    """GPU-hours so far: the time that finished stages and the current stage took, times the GPUs held meanwhile."""
    start_time: datetime | None = None
    estimated_completion_time: datetime | None = None
    """When the run ends if the remaining rounds take as long as the latest one; absent until a round is done."""
    completion_time: datetime | None = None
