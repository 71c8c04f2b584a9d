"""Small results that stages leave and the plan reads. Each is created once and proves that its stage is done."""

from dagger_operator.api import EvaluationSummary, RolloutSummary, TrainingSummary
from dagger_operator.store.records import Record


class PreflightResult(Record):
    """Both policies answer as they should."""

    student: str
    """Policy version served at the start."""
    teacher: str
    checks: dict[str, str]
    """Check by name, with what was found."""


class RolloutResult(Record):
    summary: RolloutSummary
    manifest_digest: str
    excluded: dict[str, int]
    """Rollouts excluded for infrastructure, by reason."""


class TrainingResult(Record):
    summary: TrainingSummary
    policy: str
    """Policy version that was made."""


class PublishResult(Record):
    policy: str
    replicas: int
    seconds: float


class EvaluationResult(Record):
    summary: EvaluationSummary
    resolved_tasks: tuple[str, ...]
    unresolved_tasks: tuple[str, ...]
    """Both by task id, sorted: what paired comparisons need."""


class StageProgress(Record):
    """How far one worker of a stage is; overwritten, never a basis for decisions."""

    done: int
    total: int
    unit: str
    """`rollouts`, `steps`, ..."""
    counters: dict[str, float] = {}
    """Such as outcomes, turns, loss."""
    seconds: float = 0.0
