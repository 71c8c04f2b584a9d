"""An evaluation's numbers rest on what was measured, and on nothing else."""

from dagger_operator.evaluation.statistics import wilson
from dagger_operator.evaluation.summary import evaluation_result
from dagger_operator.store.records import Outcome, Trajectory


def ended(task: str, outcome: Outcome, *, submitted: bool = False) -> Trajectory:
    return Trajectory(run="r", round=1, rollout_id=task, task_id=task, student="s", turns=(), outcome=outcome, submitted=submitted)


def test_broken_rollouts_are_counted_apart_and_false_submits_by_name() -> None:
    found = evaluation_result(
        "r001-abc",
        [
            ended("b", Outcome.RESOLVED, submitted=True),
            ended("a", Outcome.UNRESOLVED, submitted=True),
            ended("d", Outcome.UNRESOLVED),
            ended("c", Outcome.LIMIT_REACHED),
            ended("f", Outcome.POLICY_ERROR),
            ended("e", Outcome.INFRASTRUCTURE_FAILURE),
        ],
        confidence=0.9,
        seconds=3.0,
    )
    assert found.resolved_tasks == ("b",)
    assert found.unresolved_tasks == ("a", "c", "d", "f")
    summary = found.summary
    assert (summary.tasks, summary.resolved, summary.resolved_rate, summary.false_submits, summary.infrastructure_failures) == (
        5,
        1,
        0.2,
        1,
        1,
    )
    assert tuple(summary.interval) == wilson(1, 5, 0.9)


def test_nothing_measured_is_no_rate_and_the_whole_interval() -> None:
    summary = evaluation_result("p", [ended("a", Outcome.INFRASTRUCTURE_FAILURE)], confidence=0.95, seconds=0.0).summary
    assert (summary.tasks, summary.resolved_rate, summary.interval) == (0, 0.0, [0.0, 1.0])
