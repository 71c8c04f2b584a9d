"""Trajectory and turn: the record of one rollout, O(turns) in size.

A turn's state is stored as a delta: how many messages it keeps of the previous state, and the messages that follow.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dagger_operator.api import Role
from dagger_operator.store.logprobs import TopLogprobs

Message = dict[str, Any]
"""A chat message in the format of the OpenAI API: role, content, tool_calls, tool_call_id."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Outcome(StrEnum):
    """How a rollout ended. Only the last is not the agent's doing: it is retried, then excluded, never scored as zero."""

    RESOLVED = "Resolved"
    UNRESOLVED = "Unresolved"
    LIMIT_REACHED = "LimitReached"
    POLICY_ERROR = "PolicyError"
    INFRASTRUCTURE_FAILURE = "InfrastructureFailure"


class LabelFlaw(StrEnum):
    """Why a state has no label that can be trained on."""

    TRUNCATED = "Truncated"
    UNPARSABLE = "Unparsable"
    REFUSED = "Refused"
    """The teacher cannot continue from this state, for example because its context is too long for it."""
    REQUEST_FAILED = "RequestFailed"
    """The teacher could not be asked: infrastructure's fault."""


class Completion(Record):
    """One turn of a policy: an executed action or a label."""

    message: Message
    """The assistant's message."""
    policy: str
    """Policy version that produced it."""
    finish_reason: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    latency_seconds: float = 0.0
    # Omitted if there are none, so that data digests of runs that request none do not change.
    logprobs: TopLogprobs | None = Field(default=None, exclude_if=lambda value: value is None)
    """For labels only: the teacher's distribution, if `labels.topLogprobs` requests it."""


class Turn(Record):
    """One visited state, the action taken there, and the teacher's label for it."""

    index: int
    """From 0."""
    actor: Role
    beta: float
    """Nominal probability that the teacher acts; for StudentPrefix 1.0 from turn kappa on, 0.0 before."""
    coin: float
    """The draw in [0, 1): the teacher acts if coin < beta."""
    kept: int
    """Number of messages at the start of the previous state that this state keeps."""
    messages: tuple[Message, ...]
    """Messages of this state that follow those."""
    tools: tuple[dict[str, Any], ...] | None = None
    """Tool schemas of the request if they differ from the previous turn's (turn 0: from none)."""
    action: Completion
    """The turn that was executed."""
    label: Completion | None = None
    """The teacher's turn at this state; where the teacher acted, equal to `action` except for log-probabilities."""
    label_flaw: LabelFlaw | None = None
    """Set if the label must not be trained on; `label` may then hold what was received."""


class Failure(Record):
    """Why infrastructure broke a rollout, or why a policy could not continue."""

    reason: str
    """CamelCase, from a bounded set."""
    message: str


class Timings(Record):
    """Seconds; parts may overlap."""

    started_at: float = 0.0
    """Unix time."""
    total: float = 0.0
    sandbox: float = 0.0
    acting: float = 0.0
    commands: float = 0.0
    labels: float = 0.0
    grading: float = 0.0


class Trajectory(Record):
    """The record of one rollout."""

    run: str
    round: int
    rollout_id: str
    """Unique within a round and kind: the rollout's ordinal."""
    task_id: str
    attempt: int = 0
    """Which of a task's `rolloutsPerTask` attempts this is, from 0."""
    student: str
    """Policy version of the student."""
    teacher: str = ""
    kappa: int | None = None
    """StudentPrefix: number of turns given to the student."""
    turns: tuple[Turn, ...]
    outcome: Outcome
    exit_status: str = ""
    """How the scaffold ended, in its own words."""
    submitted: bool = False
    """Whether the agent declared its work done."""
    patch: str = ""
    """The change that was graded."""
    failure: Failure | None = None
    tries: int = 1
    """How often this rollout was started, infrastructure failures included."""
    worker: str = ""
    timings: Timings = Timings()


class LabelledState(Record):
    """One training sample: the state, and the teacher's turn at it."""

    task_id: str
    rollout_id: str
    turn: int
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None
    label: Message
    logprobs: TopLogprobs | None
    """The teacher's distribution at the label's tokens."""


def states(trajectory: Trajectory) -> Iterator[tuple[Turn, tuple[Message, ...], tuple[dict[str, Any], ...] | None]]:
    """Yield every turn with its whole state and its tools."""
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    for turn in trajectory.turns:
        messages = messages[: turn.kept] + turn.messages
        tools = turn.tools if turn.tools is not None else tools
        yield turn, messages, tools


def labelled_states(trajectory: Trajectory) -> Iterator[LabelledState]:
    """Yield the states of a trajectory that can be trained on; none if infrastructure broke the rollout."""
    if trajectory.outcome is Outcome.INFRASTRUCTURE_FAILURE:
        return
    for turn, messages, tools in states(trajectory):
        if turn.label is not None and turn.label_flaw is None:
            yield LabelledState(
                task_id=trajectory.task_id,
                rollout_id=trajectory.rollout_id,
                turn=turn.index,
                messages=messages,
                tools=tools or None,
                label=turn.label.message,
                logprobs=turn.label.logprobs,
            )
