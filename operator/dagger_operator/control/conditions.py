"""Conditions in the standard form, all their reasons, and what changed in them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal

from dagger_operator.api import Condition

MESSAGE_LIMIT = 1024
"""Maximum characters of a message; the end is cut, since the start says what it is about."""


class ConditionType(StrEnum):
    ACCEPTED = "Accepted"
    """The resource can be run."""
    PROGRESSING = "Progressing"
    """A stage is running; if not, the reason says what the run waits for."""
    SERVERS_READY = "ServersReady"
    """The policies served by the run answer; absent if there are none."""
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    """All rounds are done."""
    FAILED = "Failed"
    """The run is stopped until it is changed or resumed."""


class Reason(StrEnum):
    """This operator's own reasons; a pod's or a stage's reason is passed on unchanged."""

    VALID = "Valid"
    INVALID_SPEC = "InvalidSpec"
    STAGE_STARTING = "StageStarting"
    SERVERS_STARTING = "ServersStarting"
    SERVERS_READY = "ServersReady"
    SERVERS_RELEASED = "ServersReleased"
    LEFTOVERS_STOPPING = "LeftoversStopping"
    WAITING_FOR_GPUS = "WaitingForGpus"
    WAITING_FOR_EVALUATION = "WaitingForEvaluation"
    NODE_LOST = "NodeLost"
    WAITING_IN_QUEUE = "WaitingInQueue"
    ACTIVE_DEADLINE_EXCEEDED = "ActiveDeadlineExceeded"
    PRE_RUNNING_DEADLINE_EXCEEDED = "PreRunningDeadlineExceeded"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    RESULT_MISSING = "ResultMissing"
    SUSPENDED = "Suspended"
    NOT_SUSPENDED = "NotSuspended"
    ROUNDS_DONE = "RoundsDone"
    ROUNDS_LEFT = "RoundsLeft"
    NOT_FAILED = "NotFailed"


IN_A_QUEUE = "SchedulingGated"
"""Reason of a pod that still has to be admitted, for example by Kueue."""


def running(stage: str) -> str:
    """Return the reason of a progressing run with a running stage, such as `RolloutRunning`."""
    return f"{stage.capitalize()}Running"


@dataclass(frozen=True)
class Event:
    """Something to report to people once; emitted after the status with the same content was written."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def condition(kind: ConditionType, holds: bool, reason: str, message: str = "") -> Condition:
    if len(message) > MESSAGE_LIMIT:
        message = message[: MESSAGE_LIMIT - 1] + "…"
    return Condition(type=kind, status="True" if holds else "False", reason=reason, message=message)


def settle(fresh: Iterable[Condition], previous: Sequence[Condition], generation: int | None, now: datetime) -> list[Condition]:
    """Return fresh conditions with the generation they were made for, and the time when their status last changed."""
    before = {one.type: one for one in previous}
    settled = []
    for one in fresh:
        old = before.get(one.type)
        since = old.last_transition_time if old is not None and old.status == one.status else None
        settled.append(one.model_copy(update={"observed_generation": generation, "last_transition_time": since or now}))
    return settled


def events(previous: Sequence[Condition], settled: Sequence[Condition]) -> tuple[Event, ...]:
    """Return the events for a change of conditions: an end, a new reason to wait, a new stage."""
    before, ended = {one.type: one for one in previous}, any(one.type == ConditionType.FAILED and one.status == "True" for one in settled)
    told = []
    for one in settled:
        old = before.get(one.type)
        if old is not None and (old.status, old.reason) == (one.status, one.reason):
            continue
        match one.type, one.status:
            case (ConditionType.FAILED, "True") | (ConditionType.ACCEPTED, "False"):
                told.append(Event("Warning", one.reason, one.message))
            case (ConditionType.SUCCEEDED | ConditionType.SUSPENDED, "True"):
                told.append(Event("Normal", one.reason, one.message))
            case (ConditionType.PROGRESSING, progresses) if not ended and one.reason not in _TOLD_BY_OTHERS:
                usual = progresses == "True" or one.reason in _PASSES_BY_ITSELF
                told.append(Event("Normal" if usual else "Warning", one.reason, one.message))
    return tuple(told)


_TOLD_BY_OTHERS = frozenset({Reason.SUSPENDED, Reason.ROUNDS_DONE, Reason.INVALID_SPEC})
_PASSES_BY_ITSELF = frozenset(
    {
        Reason.SERVERS_STARTING,
        Reason.LEFTOVERS_STOPPING,
        Reason.WAITING_FOR_GPUS,
        Reason.WAITING_FOR_EVALUATION,
        Reason.WAITING_IN_QUEUE,
        IN_A_QUEUE,
    }
)
"""Reasons to wait that occur in every run; any other one is a warning."""
