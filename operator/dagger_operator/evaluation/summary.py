"""Computes an evaluation's result from its finished rollouts: pure."""

from collections.abc import Sequence

from dagger_operator.api import EvaluationSummary
from dagger_operator.evaluation.statistics import wilson
from dagger_operator.store.records import Outcome, Trajectory
from dagger_operator.store.results import EvaluationResult


def evaluation_result(policy: str, trajectories: Sequence[Trajectory], *, confidence: float, seconds: float) -> EvaluationResult:
    """Return the result. Rollouts that infrastructure broke are no measurement: they are counted separately and enter no rate."""
    graded = [trajectory for trajectory in trajectories if trajectory.outcome is not Outcome.INFRASTRUCTURE_FAILURE]
    resolved = {trajectory.task_id for trajectory in graded if trajectory.outcome is Outcome.RESOLVED}
    low, high = wilson(len(resolved), len(graded), confidence)
    summary = EvaluationSummary(
        policy=policy,
        tasks=len(graded),
        resolved=len(resolved),
        resolved_rate=len(resolved) / len(graded) if graded else 0.0,
        interval=[low, high],
        false_submits=sum(trajectory.submitted and trajectory.task_id not in resolved for trajectory in graded),
        infrastructure_failures=len(trajectories) - len(graded),
        seconds=seconds,
    )
    return EvaluationResult(
        summary=summary,
        resolved_tasks=tuple(sorted(resolved)),
        unresolved_tasks=tuple(sorted({trajectory.task_id for trajectory in graded} - resolved)),
    )
