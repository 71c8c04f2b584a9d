"""Small results that stages store and the plan reads. Each is created once and proves that its stage is done."""

from collections.abc import Mapping
from statistics import fmean
from types import MappingProxyType
from typing import Annotated, ClassVar, TypeVar

from pydantic import AfterValidator, ValidationError

from dagger_operator.api import EvaluationSummary, RolloutSummary, TrainingSummary
from dagger_operator.api.course import StageName
from dagger_operator.store import layout
from dagger_operator.store.objects import DamagedObject, Reads, Store
from dagger_operator.store.records import Record
from dagger_operator.store.stage import StageFailure

RESULT_BYTES = 4 << 20
"""Upper bound of a result: 100,000 tasks by name are 3 MiB."""
MOST_LOSSES = 10_000
"""Maximum number of losses in a result: 0.2 MiB, however many steps there were."""


class Result(Record):
    """Stored by a stage when it is done."""

    stage: ClassVar[StageName]


R = TypeVar("R", bound=Result)


class PrepareResult(Result):
    """The prefix belongs to this run, the store honours conditional writes, and the first student is in it."""

    stage = StageName.PREPARE

    policy: str
    """Version of the initial student."""
    teacher: str
    """Version of the teacher."""
    teacher_revision: str = ""
    """Commit of a teacher from the Hugging Face hub, so that every replica serves the same one."""
    round_trip_seconds: float = 0.0
    """Median time of one small read from the store."""
    seconds: float = 0.0


class PreflightResult(Result):
    """Both policies answer correctly."""

    stage = StageName.PREFLIGHT

    student: str
    """Policy version served at the start."""
    teacher: str
    checks: dict[str, str]
    """Findings, by name of the check."""


class RolloutResult(Result):
    stage = StageName.ROLLOUT

    summary: RolloutSummary
    manifest_digest: str
    excluded: dict[str, int]
    """Rollouts excluded for infrastructure failures, by reason."""


def _few(losses: tuple[float, ...]) -> tuple[float, ...]:
    """Average longer losses down to `MOST_LOSSES`: means over equal stretches of steps; the last may be shorter."""
    steps = -(-len(losses) // MOST_LOSSES)
    return losses if steps <= 1 else tuple(fmean(losses[start : start + steps]) for start in range(0, len(losses), steps))


class TrainingResult(Result):
    stage = StageName.TRAINING

    summary: TrainingSummary
    policy: str
    """Policy version that was made."""
    losses: Annotated[tuple[float, ...], AfterValidator(_few)] = ()
    """Mean loss over the targets of each optimiser step; if more than 10,000 steps, means over equal stretches of them."""


class PublishResult(Result):
    stage = StageName.PUBLISH

    policy: str
    replicas: int
    seconds: float


class EvaluationResult(Result):
    stage = StageName.EVALUATION

    summary: EvaluationSummary
    resolved_tasks: tuple[str, ...]
    unresolved_tasks: tuple[str, ...]
    """Both by task id, sorted: needed for paired comparisons."""


class StageProgress(Record):
    """Progress of one worker of a stage; overwritten, never a basis for decisions."""

    done: int
    total: int
    unit: str
    """`rollouts`, `steps`, ..."""
    counters: dict[str, float] = {}
    """For example outcomes, turns, loss."""
    seconds: float = 0.0
    """Time spent on the work done beyond `before`."""
    before: int = 0
    """Work already done when this worker started: its speed follows from the rest."""


KINDS: Mapping[str, type[Result]] = MappingProxyType(
    {kind.stage: kind for kind in (PrepareResult, PreflightResult, RolloutResult, TrainingResult, PublishResult, EvaluationResult)}
)
"""Type of result by stage."""


async def save_result(store: Store, round_number: int, result: Result) -> bool:
    """Put-if-absent: return False if the stage was done already; then the first result stands.

    Raises `StageFailure` for a result that is too large to be read.
    """
    data = result.model_dump_json(indent=1).encode()
    if len(data) > RESULT_BYTES:
        raise StageFailure(
            "ResultTooLarge",
            f"the result of stage {result.stage} of round {round_number} has {len(data)} bytes, where {RESULT_BYTES} at most are read; "
            "that of an evaluation names every task: make a new run with a lower tasks.heldOut.count, or with shorter ids of tasks",
        )
    return await store.create(layout.result(round_number, result.stage), data)


async def read_result(store: Reads, round_number: int, kind: type[R]) -> R | None:
    """Return the result of a stage, or None if it is not done. Raises `DamagedObject` if it cannot be read."""
    key = layout.result(round_number, kind.stage)
    found = await store.get(key, RESULT_BYTES)
    if found is None:
        return None
    try:
        return kind.model_validate_json(found.data)
    except ValidationError as error:
        remedy = "delete it and start the stage again: it continues from what is there"
        raise DamagedObject(key, f"is no {kind.__name__}: {error.errors()[0]['msg']}", remedy) from error
