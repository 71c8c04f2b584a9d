"""A student is evaluated while the next round's rollouts ask it, and is not replaced before that is done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Phase
from dagger_operator.control import ChildState, Plan, Results, next_steps, read_results
from dagger_operator.store.objects import Store
from dagger_operator.store.owner import take_prefix
from dagger_operator.store.results import save_result
from fixtures.results import result

Wanted = Callable[[Plan], dict[tuple[str, str], Any]]
Story = Any


@pytest.mark.parametrize("training", ["Enabled", "Disabled"])
@pytest.mark.parametrize("initial", [False, True], ids=["trained students", "the initial one too"])
@pytest.mark.parametrize("overlap", ["NextRound", "None"])
@pytest.mark.parametrize(
    ("mode", "evaluated"), [("EveryRound", {1, 2}), ("LastRound", {2}), ("Disabled", set())], ids=["every round", "last round", "disabled"]
)
def test_evaluation_follows_its_mode(
    story: Callable[..., Story], mode: str, evaluated: set[int], overlap: str, initial: bool, training: str
) -> None:
    tale = story(evaluation={"mode": mode, "overlap": overlap, "initial": initial}, training={"mode": training})
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
    assert seen == (evaluated if training == "Enabled" else set()) | ({0} if initial else set())


INITIAL = {"initial": True}


def test_the_initial_student_is_evaluated_beside_the_first_rollouts_and_not_replaced_before(
    story: Callable[..., Story], wanted: Wanted
) -> None:
    tale = story(evaluation=INITIAL)
    tale.into_rollouts()
    both = tale.plan()
    jobs = {key[1]: one for key, one in wanted(both).items() if key[0] == "Job"}
    assert jobs.keys() == {"rollout", "evaluation"}
    assert jobs["evaluation"]["metadata"]["name"].startswith("demo-r000-evaluation-")
    env = {one["name"]: one.get("value") for one in jobs["evaluation"]["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert (env["DAGGER_ROUND"], env["DAGGER_POLICY"]) == ("0", "r000-base")
    assert (both.status.phase, both.status.round) == (Phase.ROLLOUT, 1)
    assert "round 0 of 2, evaluation beside it" in tale.condition("Progressing").message
    tale.done("rollout", "training", round_number=1)
    publishing = tale.plan()
    assert {key[1] for key in wanted(publishing) if key[0] == "Job"} == {"evaluation"}, "the student must stay what is measured"
    assert (publishing.status.phase, publishing.status.reason) == (Phase.PUBLISHING, "EvaluationRunning")
    tale.done("evaluation")
    assert ("Job", "publish") in wanted(tale.plan())


def test_without_overlap_the_first_rollouts_wait_for_the_initial_students_evaluation(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(evaluation={**INITIAL, "overlap": "None"})
    tale.into_rollouts()
    planned = tale.plan()
    assert {key for key in wanted(planned) if key[0] == "Job"} == {("Job", "evaluation")}
    assert (planned.status.phase, planned.status.round) == (Phase.EVALUATION, 0)
    tale.done("evaluation")
    assert {key for key in wanted(tale.plan()) if key[0] == "Job"} == {("Job", "rollout")}


def test_time_shared_the_first_training_waits_for_the_initial_students_evaluation(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(gpuSharing="TimeShared", evaluation=INITIAL)
    tale.into_rollouts()
    tale.done("rollout", round_number=1)
    held = wanted(tale.plan())
    assert held["Deployment", "student"]["spec"]["replicas"] == 2
    assert {key for key in held if key[0] == "Job"} == {("Job", "evaluation")}
    tale.done("evaluation")
    assert wanted(tale.plan())["Deployment", "student"]["spec"]["replicas"] == 0


def test_where_nothing_is_trained_nothing_waits_for_the_evaluation_and_the_teacher_goes_with_the_last_rollouts(
    story: Callable[..., Story], wanted: Wanted
) -> None:
    tale = story(evaluation=INITIAL, training={"mode": "Disabled"}, teacher={"model": "t", "serving": {"gpus": 2}})
    tale.into_rollouts()
    for number in (1, 2):
        planned = wanted(tale.plan())
        assert {key[1] for key in planned if key[0] == "Job"} == {"rollout", "evaluation"}
        assert ("Deployment", "teacher") in planned
        tale.done("rollout", round_number=number)
    last = wanted(tale.plan())
    assert {key for key in last if key[0] in ("Job", "Deployment")} == {("Job", "evaluation"), ("Deployment", "student")}
    tale.done("evaluation")
    assert tale.plan().status.phase is Phase.SUCCEEDED


@pytest.mark.parametrize(("training", "made_up_for"), [("Enabled", False), ("Disabled", True)])
def test_the_initial_student_can_be_evaluated_until_another_is_published(
    story: Callable[..., Story], wanted: Wanted, training: str, made_up_for: bool
) -> None:
    tale = story(training={"mode": training})
    tale.into_rollouts()
    tale.done("rollout", *(("training", "publish", "evaluation") if training == "Enabled" else ()), round_number=1)
    tale.edit(evaluation=INITIAL)
    assert (("Job", "evaluation") in wanted(tale.plan())) == made_up_for


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


def test_a_training_at_work_goes_on_where_overlap_is_forbidden_meanwhile(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story()
    into_the_second_round(tale)
    assert ("Job", "rollout") in wanted(tale.plan())
    tale.edit(evaluation={"overlap": "None"})
    waits = tale.plan()
    assert ("Job", "rollout") not in wanted(waits), "they wait for the evaluation"
    tale.carry_out(waits)
    tale.done("rollout", round_number=2)
    plan = tale.plan()
    assert {key for key in wanted(plan) if key[0] == "Job"} == {("Job", "training"), ("Job", "evaluation")}
    assert (plan.status.phase, plan.status.round) == (Phase.TRAINING, 2)


def test_time_shared_training_waits_for_the_evaluation_that_asks_the_servers(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(gpuSharing="TimeShared")
    into_the_second_round(tale)
    tale.done("rollout", round_number=2)
    held = wanted(tale.plan())
    assert held["Deployment", "student"]["spec"]["replicas"] == 2
    assert ("Job", "training") not in held
    tale.done("evaluation", round_number=1)
    assert wanted(tale.plan())["Deployment", "student"]["spec"]["replicas"] == 0


def test_time_shared_an_evaluation_that_is_wanted_while_training_is_suspended_takes_its_place(
    story: Callable[..., Story], wanted: Wanted
) -> None:
    tale = story(gpuSharing="TimeShared", evaluation={"mode": "LastRound"})
    into_the_second_round(tale)
    tale.done("rollout", round_number=2)
    tale.carry_out(tale.plan())
    tale.carry_out(tale.plan())
    assert ("Job", "training") in wanted(tale.plan())
    tale.edit(suspend=True)
    tale.carry_out(tale.plan())
    tale.edit(suspend=False, evaluation={"mode": "EveryRound"})
    for _ in range(3):
        tale.carry_out(tale.plan())
        tale.serve()
    planned = wanted(tale.plan())
    assert {key for key in planned if key[0] == "Job"} == {("Job", "evaluation")}
    assert planned["Deployment", "student"]["spec"]["replicas"] == 2
    tale.done("evaluation", round_number=1)
    tale.carry_out(tale.plan())
    tale.carry_out(tale.plan())
    assert ("Job", "training") in wanted(tale.plan()), "it goes on from its checkpoint"


def test_without_overlap_rollouts_wait_for_the_evaluation(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(evaluation={"overlap": "None"})
    into_the_second_round(tale)
    planned = tale.plan()
    assert {key for key in wanted(planned) if key[0] == "Job"} == {("Job", "evaluation")}
    assert (planned.status.phase, planned.status.round) == (Phase.EVALUATION, 1)


class Storage:
    """A run's results in a folder, as stages leave them there and a runtime reads them: what it knows it does not ask for again."""

    def __init__(self, tale: Story) -> None:
        self.tale, self.known = tale, Results()
        self.store = Store.open(tale.run.spec.storage)

    async def done(self, *stages: str, round_number: int = 0) -> None:
        await take_prefix(self.store, self.tale.run)
        for stage in stages:
            await save_result(self.store, round_number, result(stage, round_number))
        await self.look()

    async def look(self) -> None:
        self.known = await read_results(self.store, self.tale.run, self.known)
        self.tale.results = dict(self.known.records)


@pytest.mark.parametrize("beside", [("rollout",), ("rollout", "training")], ids=["rollouts", "training"])
async def test_an_evaluation_that_ends_after_what_ran_beside_it_is_seen_and_the_run_goes_on(
    story: Callable[..., Story], wanted: Wanted, tmp_path: Path, beside: tuple[str, ...]
) -> None:
    tale = story(storage={"url": f"file://{tmp_path}"})
    storage = Storage(tale)
    await storage.done("prepare", "preflight")
    await storage.done("rollout", "training", "publish", round_number=1)
    tale.carry_out(tale.plan())
    tale.serve()
    tale.carry_out(tale.plan())
    for stage in beside:
        await storage.done(stage, round_number=2)
    await storage.done("evaluation", round_number=1)
    tale.see("evaluation", state=ChildState.SUCCEEDED, pods=0, finished=tale.now)
    tale.later(minutes=2)
    await storage.look()
    planned = tale.plan()
    assert planned.status.phase is not Phase.FAILED, planned.status.reason
    assert planned.status.rounds[0].evaluation is not None
    await storage.done("training", "publish", "evaluation", round_number=2)
    assert tale.plan().status.phase is Phase.SUCCEEDED


async def test_the_initial_students_evaluation_is_seen_however_many_rounds_it_outlasts(story: Callable[..., Story], tmp_path: Path) -> None:
    tale = story(rounds=4, storage={"url": f"file://{tmp_path}"}, evaluation=INITIAL, training={"mode": "Disabled"})
    storage = Storage(tale)
    await storage.done("prepare", "preflight")
    for number in range(1, 5):
        await storage.done("rollout", round_number=number)
    assert tale.plan().status.phase is Phase.EVALUATION
    await storage.done("evaluation")
    assert tale.plan().status.phase is Phase.SUCCEEDED
