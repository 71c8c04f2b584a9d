"""Decides how a rollout ended, from its scaffold's end and its recording. Pure."""

from dataclasses import dataclass

from dagger_operator.policy.failures import CONTEXT_TOO_LONG
from dagger_operator.policy.session import Recording
from dagger_operator.rollout.scaffold import DEADLINE, LIMIT_REACHED, ScaffoldEnd
from dagger_operator.store.records import Failure, LabelFlaw, Outcome


class InfrastructureFailed(Exception):
    """Infrastructure broke a rollout: it is retried, then excluded; never scored as zero, never training data."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(f"{failure.reason}: {failure.message}")


@dataclass(frozen=True)
class Verdict:
    """How a rollout ended, before grading."""

    outcome: Outcome | None
    """None if work was submitted: its grade decides."""
    exit_status: str


def verdict(end: ScaffoldEnd, recording: Recording, *, min_coverage: float, timeout: float) -> Verdict:
    """Judge a rollout whose scaffold ended by itself or at a limit. Only submitted work is graded.

    Raises `InfrastructureFailed` if
    - a policy could not be reached,
    - it did not answer the request in progress at the end: the first request, or any request for more than half of `timeout` (the
      rollout's deadline in seconds),
    - the scaffold never took a turn (unless its first state is too long for the policy, or its deadline passed before it asked), or
    - so many label requests failed that fewer than `min_coverage` of the visited states could have a label.
    """
    if recording.failure is not None:
        raise InfrastructureFailed(recording.failure)
    if (silence := recording.silence) is not None and (not recording.turns or silence.seconds > timeout / 2):
        message = (
            f"the {silence.actor} had sent nothing for {silence.seconds:.0f} s at turn {len(recording.turns)} when it ended as {end.status}"
        )
        raise InfrastructureFailed(Failure(reason="PolicySilent", message=message))
    lost = sum(turn.label_flaw is LabelFlaw.REQUEST_FAILED for turn in recording.turns)
    if len(recording.turns) - lost < min_coverage * len(recording.turns):
        message = f"requests for {lost} of {len(recording.turns)} labels failed"
        raise InfrastructureFailed(Failure(reason="LabelsUnavailable", message=message))
    if (refusal := recording.policy_error) is not None:
        if not recording.turns and refusal.reason != CONTEXT_TOO_LONG:
            raise InfrastructureFailed(refusal)  # scaffold and policy do not fit: nobody has acted yet, so there is nothing to judge
        return Verdict(Outcome.POLICY_ERROR, refusal.reason)
    if not recording.turns and end.status != DEADLINE:
        message = f"it ended as {end.status} before its first turn: {end.submission[-500:]}"
        raise InfrastructureFailed(Failure(reason="ScaffoldNeverActed", message=message))
    if recording.limit_reached or end.status in (DEADLINE, LIMIT_REACHED):
        return Verdict(Outcome.LIMIT_REACHED, DEADLINE if end.status == DEADLINE else LIMIT_REACHED)
    return Verdict(None if end.submitted else Outcome.UNRESOLVED, end.status)


def patch_of(end: ScaffoldEnd, collected: str) -> str:
    """Return the patch to grade: the one that the agent submitted, or else all its changes."""
    text = end.submission.lstrip()
    return text if text.startswith(("diff --git ", "--- ")) else collected
