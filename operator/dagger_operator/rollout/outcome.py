"""How a rollout ended, decided from what ended: pure."""

from dataclasses import dataclass

from dagger_operator.policy.session import Recording
from dagger_operator.rollout.scaffold import DEADLINE, LIMIT_REACHED, ScaffoldEnd
from dagger_operator.store.records import Failure, LabelFlaw, Outcome


class InfrastructureFailed(Exception):
    """Infrastructure broke a rollout: it is tried again, then excluded; never a zero, never training data."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(f"{failure.reason}: {failure.message}")


@dataclass(frozen=True)
class Verdict:
    """How a rollout ended before anything was graded."""

    outcome: Outcome | None
    """None where work was submitted: its grade decides."""
    exit_status: str


def verdict(end: ScaffoldEnd, recording: Recording, *, min_coverage: float) -> Verdict:
    """Judges a rollout whose scaffold ended by itself or at a limit. Only submitted work is graded.

    Raises `InfrastructureFailed` where a policy could not be reached, where the scaffold never took a turn, or where so many
    requests for labels failed that fewer than `min_coverage` of the visited states could have one.
    """
    if recording.failure is not None:
        raise InfrastructureFailed(recording.failure)
    lost = sum(turn.label_flaw is LabelFlaw.REQUEST_FAILED for turn in recording.turns)
    if len(recording.turns) - lost < min_coverage * len(recording.turns):
        message = f"requests for {lost} of {len(recording.turns)} labels failed"
        raise InfrastructureFailed(Failure(reason="LabelsUnavailable", message=message))
    if recording.policy_error is not None:
        return Verdict(Outcome.POLICY_ERROR, recording.policy_error.reason)
    if not recording.turns and end.status != DEADLINE:
        message = f"it ended as {end.status} before its first turn: {end.submission[-500:]}"
        raise InfrastructureFailed(Failure(reason="ScaffoldNeverActed", message=message))
    if recording.limit_reached or end.status in (DEADLINE, LIMIT_REACHED):
        return Verdict(Outcome.LIMIT_REACHED, DEADLINE if end.status == DEADLINE else LIMIT_REACHED)
    return Verdict(None if end.submitted else Outcome.UNRESOLVED, end.status)


def patch_of(end: ScaffoldEnd, collected: str) -> str:
    """The patch to grade: the one that the agent handed over, or everything that it changed."""
    text = end.submission.lstrip()
    return text if text.startswith(("diff --git ", "--- ")) else collected
