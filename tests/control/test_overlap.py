"""A student is evaluated while the next round's rollouts ask it, and is not replaced before that is done."""

from collections.abc import Callable
from typing import Any

import pytest

from dagger_operator.api import Phase
from dagger_operator.control import Plan, Results, next_steps

Wanted = Callable[[Plan], dict[tuple[str, str], Any]]
Story = Any


@pytest.mark.parametrize("overlap", ["NextRound", "None"])
@pytest.mark.parametrize(
    ("mode", "evaluated"), [("EveryRound", {1, 2}), ("LastRound", {2}), ("Disabled", set())], ids=["every round", "last round", "disabled"]
)
def test_evaluation_follows_its_mode(story: Callable[..., Story], mode: str, evaluated: set[int], overlap: str) -> None:
    tale = story(evaluation={"mode": mode, "overlap": overlap})
    seen = set()
    for _ in range(20):
        work = next_steps(tale.run.spec, Results(tale.results))
        if work is None:
            break
        assert work.beside is None or overlap == "NextRound"
        seen |= {step.round for step in work if step.stage == "evaluation"}
        last = list(work)[-1]
        tale.done(str(last.stage), round_number=last.round)
    assert tale.plan().status.phase is Phase.SUCCEEDED
    assert seen == evaluated


def into_the_second_round(story: Story) -> None:
    """Round 1 is published, its student not yet evaluated."""
    story.into_rollouts()
    story.done("rollout", "training", "publish", round_number=1)
    story.children = {key: one for key, one in story.children.items() if one.kind != "Job"}
    story.carry_out(story.plan())


def test_a_student_is_evaluated_while_it_rolls_out_the_next_round(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story()
    into_the_second_round(tale)
    both = tale.plan()
    assert {key for key in wanted(both) if key[0] == "Job"} == {("Job", "rollout"), ("Job", "evaluation")}
    assert (both.status.phase, both.status.round) == (Phase.ROLLOUT, 2)
    assert "evaluation beside it" in tale.condition("Progressing").message
    tale.done("rollout", round_number=2)
    assert {key[1] for key in wanted(tale.plan()) if key[0] == "Job"} == {"training", "evaluation"}, "training has GPUs of its own"
    tale.done("training", round_number=2)
    publishing = tale.plan()
    assert {key[1] for key in wanted(publishing) if key[0] == "Job"} == {"evaluation"}, "the student must stay what is measured"
    assert (publishing.status.phase, publishing.status.reason) == (Phase.PUBLISHING, "EvaluationRunning")
    tale.done("evaluation", round_number=1)
    assert ("Job", "publish") in wanted(tale.plan())


def test_time_shared_training_waits_for_the_evaluation_that_asks_the_servers(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(gpuSharing="TimeShared")
    into_the_second_round(tale)
    tale.done("rollout", round_number=2)
    held = wanted(tale.plan())
    assert held["Deployment", "student"]["spec"]["replicas"] == 2
    assert ("Job", "training") not in held
    tale.done("evaluation", round_number=1)
    assert wanted(tale.plan())["Deployment", "student"]["spec"]["replicas"] == 0


def test_without_overlap_rollouts_wait_for_the_evaluation(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(evaluation={"overlap": "None"})
    into_the_second_round(tale)
    planned = tale.plan()
    assert {key for key in wanted(planned) if key[0] == "Job"} == {("Job", "evaluation")}
    assert (planned.status.phase, planned.status.round) == (Phase.EVALUATION, 1)
