"""The life of a run, told in order: what is asked for, and what is said."""

from collections.abc import Callable
from typing import Any

import pytest

from dagger_operator.api import Phase, Problem
from dagger_operator.control import RETRY, Child, ChildState, Observed, Plan, Ref, Trouble, child, news, plan, refused

Wanted = Callable[[Plan], dict[tuple[str, str], Any]]
Story = Any


def test_first_the_run_is_prepared_and_nothing_is_served(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story()
    first = tale.plan()
    assert wanted(first).keys() == {("Job", "prepare")}
    assert first.status.phase is Phase.PREPARING
    assert first.status.start_time == tale.now


def test_then_servers_start_and_preflight_waits_for_them_saying_so(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story()
    tale.done("prepare")
    starting = tale.plan()
    assert wanted(starting).keys() == {("Deployment", "student"), ("Service", "student"), ("NetworkPolicy", "serving")}
    assert (starting.status.phase, starting.status.reason) == (Phase.PREFLIGHT, "ServersStarting")
    tale.carry_out(starting)
    tale.see("student", trouble=Trouble("Unschedulable", "pod demo-student-x: 0/3 nodes have nvidia.com/gpu", tale.now))
    tale.later(minutes=20)
    waiting = tale.plan()
    assert waiting.status.reason == "Unschedulable"
    assert tale.condition("ServersReady").status == "False"
    assert "0/3 nodes have nvidia.com/gpu (since 2026-01-01 00:00:00 UTC)" in tale.condition("Progressing").message
    tale.serve()
    assert ("Job", "preflight") in wanted(tale.plan())
    assert tale.condition("ServersReady").status == "True"


def test_a_round_is_rollout_training_publish_evaluation_and_each_hands_on_the_policy(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story()
    tale.into_rollouts()
    acting = []
    for number in (1, 2):
        for stage in ("rollout", "training", "publish", "evaluation"):
            planned = tale.plan()
            job = wanted(planned)["Job", stage]
            assert job["metadata"]["name"].startswith(f"demo-r{number:03d}-{stage}-")
            env = {one["name"]: one.get("value") for one in job["spec"]["template"]["spec"]["containers"][0]["env"]}
            acting.append(env.get("DAGGER_POLICY"))
            tale.carry_out(planned)
            tale.done(stage, round_number=number)
            tale.children = {key: one for key, one in tale.children.items() if one.component != stage}
    assert acting == ["r000-base", None, "r001-made", "r001-made", "r001-made", None, "r002-made", "r002-made"]
    end = tale.plan()
    assert end.objects == ()
    servers = {("Deployment", "demo-student"), ("Service", "demo-student"), ("NetworkPolicy", "demo-serving")}
    assert {(ref.kind, ref.name) for ref in end.remove} == servers
    assert end.status.phase is Phase.SUCCEEDED
    assert (end.status.resolved, end.status.teacher_share) == ("27.3%", "62.0%")
    assert tale.condition("Succeeded").status == "True"
    assert end.requeue_after is None


def test_a_failed_stage_fails_the_run_in_the_stage_s_own_words_and_frees_the_gpus(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story()
    tale.into_rollouts()
    job = tale.see("rollout", state=ChildState.FAILED, pods=0, trouble=Trouble("LabelCoverageTooLow", "0.71 < 0.95: raise labels.attempts"))
    failed = tale.plan()
    assert (failed.status.phase, failed.status.reason) == (Phase.FAILED, "LabelCoverageTooLow")
    assert "raise labels.attempts" in tale.condition("Failed").message
    assert [event.type for event in failed.events] == ["Warning"]
    assert wanted(failed)["Deployment", "student"]["spec"]["replicas"] == 0
    assert job.ref not in failed.remove, "the failed Job is what remembers the failure"
    tale.carry_out(failed)
    assert tale.plan().status == failed.status
    assert tale.plan().events == ()

    # `daggerctl resume` bumps the annotation: a new attempt, the old one is a leftover.
    metadata = tale.run.metadata.model_copy(update={"annotations": {RETRY: "1"}})
    tale.run = tale.run.model_copy(update={"metadata": metadata})
    again = tale.plan()
    assert job.ref in again.remove
    assert wanted(again)["Deployment", "student"]["spec"]["replicas"] == 2
    tale.carry_out(again)
    tale.serve()
    retried = wanted(tale.plan())["Job", "rollout"]
    assert retried["metadata"]["name"] != job.name
    assert tale.condition("Failed").status == "False"


def test_deleting_the_failed_job_by_hand_is_a_retry_too(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story()
    tale.into_rollouts()
    job = tale.see("rollout", state=ChildState.FAILED, pods=0)
    tale.plan()
    del tale.children["Job", job.name]
    assert wanted(tale.plan())["Job", "rollout"]["metadata"]["name"] == job.name


def test_a_server_that_is_given_up_fails_the_run_and_is_remembered_on_its_deployment(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story()
    tale.done("prepare")
    tale.carry_out(tale.plan())
    tale.see("student", state=ChildState.FAILED, trouble=Trouble("DamagedObject", "model.safetensors is cut short: run fsck"))
    failed = tale.plan()
    assert (failed.status.phase, failed.status.reason) == (Phase.FAILED, "DamagedObject")
    given_up = wanted(failed)["Deployment", "student"]
    assert given_up["spec"]["replicas"] == 0
    # Its pods are gone; a controller that knows nothing else comes to the same end.
    tale.children["Deployment", "demo-student"] = child(given_up, (), tale.now)
    tale.run = tale.run.model_copy(update={"status": None})
    assert (tale.plan().status.phase, tale.plan().status.reason) == (Phase.FAILED, "DamagedObject")
    # An edit that the server can see is another attempt.
    tale.edit(student={"model": "m", "serving": {"gpus": 1, "maxModelLen": 4096}})
    fresh = wanted(tale.plan())["Deployment", "student"]
    assert fresh["spec"]["replicas"] == 1
    assert "annotations" not in fresh["metadata"]


def test_suspension_stops_everything_and_resumption_goes_on_with_the_same_job(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story()
    tale.into_rollouts()
    tale.edit(suspend=True)
    held = tale.plan()
    assert (held.status.phase, held.status.reason) == (Phase.SUSPENDED, "Suspended")
    job = wanted(held)["Job", "rollout"]
    assert job["spec"]["suspend"] is True
    assert wanted(held)["Deployment", "student"]["spec"]["replicas"] == 0
    assert held.remove == ()
    tale.see("rollout", state=ChildState.SUSPENDED, pods=0)
    tale.see("student", state=ChildState.SUSPENDED, pods=0)
    tale.edit(suspend=False)
    # Workers would only fail before the servers are back.
    waking = wanted(tale.plan())
    assert waking["Deployment", "student"]["spec"]["replicas"] == 2
    assert waking["Job", "rollout"]["spec"]["suspend"] is True
    tale.serve()
    going_on = wanted(tale.plan())["Job", "rollout"]
    assert "suspend" not in going_on["spec"]
    assert going_on["metadata"]["name"] == job["metadata"]["name"]


def test_time_shared_gpus_change_hands_only_when_they_are_seen_to_be_free(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(gpuSharing="TimeShared")
    tale.into_rollouts()
    tale.done("rollout", round_number=1)
    tale.see("rollout", state=ChildState.SUCCEEDED, pods=0)
    leaving = tale.plan()
    assert wanted(leaving)["Deployment", "student"]["spec"]["replicas"] == 0
    assert ("Job", "training") not in wanted(leaving)
    assert leaving.status.reason == "WaitingForGpus"
    assert "Deployment demo-student" in tale.condition("Progressing").message
    tale.see("student", state=ChildState.SUSPENDED, pods=1)
    assert ("Job", "training") not in wanted(tale.plan())
    tale.see("student", pods=0)
    tale.carry_out(tale.plan())
    tale.done("training", round_number=1)
    tale.see("training", pods=1)
    winding_up = tale.plan()
    assert wanted(winding_up)["Deployment", "student"]["spec"]["replicas"] == 0
    assert ("Job", "publish") not in wanted(winding_up)
    tale.see("training", pods=0)
    assert wanted(tale.plan())["Deployment", "student"]["spec"]["replicas"] == 0, "its lost pod may come again"
    tale.see("training", state=ChildState.SUCCEEDED, pods=0)
    back = wanted(tale.plan())
    assert back["Deployment", "student"]["spec"]["replicas"] == 2
    assert ("Job", "publish") in back


def test_an_edit_restarts_what_it_concerns_and_nothing_else(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story()
    tale.into_rollouts()
    before = wanted(tale.plan())
    tale.edit(training={"learningRate": 1e-5}, rounds=7, evaluation={"mode": "LastRound"}, ttlSecondsAfterFinished=5)
    assert wanted(tale.plan()) == before
    tale.edit(rollouts={"workers": 5})
    edited = tale.plan()
    assert wanted(edited)["Deployment", "student"] == before["Deployment", "student"]
    old = before["Job", "rollout"]["metadata"]["name"]
    assert [ref.name for ref in edited.remove] == [old]
    assert ("Job", "rollout") not in wanted(edited)
    assert edited.status.reason == "LeftoversStopping", "two workers must not have one name"
    tale.see("rollout", pods=0)
    assert ("Job", "rollout") not in wanted(tale.plan()), "a Job without pods may be given some as long as it exists"
    tale.carry_out(edited)
    assert wanted(tale.plan())["Job", "rollout"]["spec"]["completions"] == 5


def test_raised_rounds_take_a_finished_run_up_again(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(rounds=1)
    tale.done("prepare", "preflight")
    tale.done("rollout", "training", "publish", "evaluation", round_number=1)
    finished = tale.plan()
    assert finished.status.phase is Phase.SUCCEEDED
    assert finished.status.completion_time == tale.now
    tale.edit(rounds=2)
    more = tale.plan()
    assert (more.status.phase, more.status.round, more.status.completion_time) == (Phase.ROLLOUT, 2, None)
    assert ("Deployment", "student") in wanted(more)
    assert tale.condition("Succeeded").status == "False"


def test_a_finished_run_goes_when_its_time_is_over(story: Callable[..., Story]) -> None:
    tale = story(rounds=1, ttlSecondsAfterFinished=60)
    tale.done("prepare", "preflight")
    tale.done("rollout", "training", "publish", "evaluation", round_number=1)
    assert (tale.plan().expired, tale.plan().requeue_after) == (False, 60.0)
    tale.later(seconds=45)
    assert (tale.plan().expired, tale.plan().requeue_after) == (False, 15.0)
    tale.later(seconds=15)
    assert tale.plan().expired


@pytest.mark.parametrize("storage", ["cleared", "away"])
def test_a_run_that_succeeded_has_succeeded_whatever_becomes_of_its_storage(story: Callable[..., Story], storage: str) -> None:
    tale = story(ttlSecondsAfterFinished=60)
    tale.into_rollouts()
    job = tale.see("rollout", state=ChildState.SUCCEEDED, pods=0, round=2)
    for number in (1, 2):
        tale.done("rollout", "training", "publish", "evaluation", round_number=number)
    end = tale.plan()
    tale.carry_out(end)
    problem = "s3://bucket/prefix: NoSuchBucket" if storage == "away" else None
    results, tale.results = tale.results, {}
    tale.later(seconds=45)
    look = tale.plan(storage_problem=problem)
    assert (look.status, look.objects, look.remove, look.events) == (end.status, (), (), ())
    assert ("Job", job.name) in tale.children, "its logs stay"
    assert (look.expired, look.requeue_after) == (False, 15.0)
    tale.later(seconds=15)
    assert tale.plan(storage_problem=problem).expired
    tale.edit(rounds=1)
    assert tale.plan(storage_problem=problem).status.round == 2
    tale.edit(rounds=3)
    tale.results = results
    assert (tale.plan().status.phase, tale.plan().status.round) == (Phase.ROLLOUT, 3), "raised rounds take it up again"


def test_what_was_said_of_a_run_that_succeeded_is_put_right(story: Callable[..., Story]) -> None:
    tale = story(rounds=1)
    tale.done("prepare", "preflight")
    tale.done("rollout", "training", "publish", "evaluation", round_number=1)
    end = tale.plan().status
    tale.run = tale.run.model_copy(
        update={"status": refused(tale.run.metadata.generation, tale.run.status, [Problem("spec.rounds", "got 0", "write 1")], tale.now)}
    )
    assert tale.plan().status == end


def test_what_cannot_be_run_is_told_once_whatever_conditions_say_it(story: Callable[..., Story]) -> None:
    tale = story()
    status = refused(tale.run.metadata.generation, tale.run.status, [Problem("spec.rounds", "got 0", "write 1")], tale.now)
    accepted = next(one for one in status.conditions if one.type == "Accepted")
    progressing = accepted.model_copy(update={"type": "Progressing"})
    told = news(tale.run.status, status.model_copy(update={"conditions": [accepted, progressing]}))
    assert [(event.type, event.reason) for event in told] == [("Warning", "InvalidSpec")]


def test_a_failed_run_goes_when_its_time_is_over_though_its_storage_is_away(story: Callable[..., Story]) -> None:
    tale = story(ttlSecondsAfterFinished=60)
    tale.into_rollouts()
    tale.see("rollout", state=ChildState.FAILED, pods=0, trouble=Trouble("Broken", "mend it"))
    assert tale.plan().status.phase is Phase.FAILED
    tale.later(seconds=57)
    blind = tale.plan(storage_problem="connection refused")
    assert (blind.status.phase, blind.expired, blind.requeue_after) == (Phase.FAILED, False, 3.0)
    tale.later(seconds=3)
    assert tale.plan(storage_problem="connection refused").expired


def test_a_deleted_run_wants_nothing_and_leaves_pods_to_the_cluster(story: Callable[..., Story]) -> None:
    tale = story()
    tale.into_rollouts()
    tale.children["Pod", "orphan"] = Child("Pod", "orphan", "rollout", pods=1)
    metadata = tale.run.metadata.model_copy(update={"deletion_timestamp": tale.now})
    gone = plan(tale.run.model_copy(update={"metadata": metadata}), Observed(tale.now, tuple(tale.children.values())))
    assert gone.objects == ()
    assert {ref.kind for ref in gone.remove} == {"Deployment", "Service", "NetworkPolicy", "Job"}


def test_without_storage_nothing_is_started_or_thrown_away_and_the_history_stays(story: Callable[..., Story]) -> None:
    tale = story()
    tale.into_rollouts()
    tale.done("rollout", round_number=1)
    known = tale.plan().status
    blind = tale.plan(storage_problem="s3://bucket/prefix: connection refused")
    assert (blind.objects, blind.remove) == ((), ())
    assert (blind.status.phase, blind.status.rounds, blind.status.reason) == (known.phase, known.rounds, "StorageUnavailable")
    assert "connection refused" in tale.condition("Progressing").message
    assert blind.requeue_after
    assert tale.plan().status.reason != "StorageUnavailable"


def test_a_job_that_succeeded_without_a_result_is_not_believed_for_ever(story: Callable[..., Story]) -> None:
    tale = story()
    tale.into_rollouts()
    tale.see("rollout", state=ChildState.SUCCEEDED, pods=0, finished=tale.now)
    assert tale.plan().status.phase is Phase.ROLLOUT
    tale.later(minutes=2)
    lost = tale.plan()
    assert (lost.status.phase, lost.status.reason) == (Phase.FAILED, "ResultMissing")
    assert "dagger-operator.dev/retry" in tale.condition("Failed").message and "daggerctl resume" in tale.condition("Failed").message
    assert "fsck" in tale.condition("Failed").message


def test_without_training_a_round_is_its_rollouts_and_endpoints_need_no_server(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(student={"model": "m", "endpoint": {"url": "http://student/v1"}}, training={"mode": "Disabled"})
    tale.done("prepare", "preflight")
    for number in (1, 2):
        planned = tale.plan()
        assert wanted(planned).keys() == {("Job", "rollout")}
        tale.done("rollout", round_number=number)
    assert tale.plan().status.phase is Phase.SUCCEEDED
    assert tale.condition("ServersReady") is None


def test_the_teacher_s_server_goes_when_nobody_will_ask_it_again(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(rounds=1, teacher={"model": "t", "serving": {"gpus": 4}})
    tale.into_rollouts()
    assert ("Deployment", "teacher") in wanted(tale.plan())
    tale.done("rollout", round_number=1)
    planned = tale.plan()
    assert ("Deployment", "student") in wanted(planned)
    assert Ref("apps/v1", "Deployment", "demo-teacher") in planned.remove


def test_jobs_that_ended_stay_for_their_logs_and_go_two_rounds_later(story: Callable[..., Story]) -> None:
    tale = story(rounds=9)
    tale.into_rollouts()
    ended = tale.see("rollout", state=ChildState.SUCCEEDED, pods=0)
    for number in (1, 2):
        tale.done("rollout", "training", "publish", "evaluation", round_number=number)
        assert (ended.ref in tale.plan().remove) == (number == 2)


@pytest.mark.parametrize("stage", ["rollout", "evaluation"])
def test_workers_keep_their_account_until_the_last_of_them_has_ended(story: Callable[..., Story], stage: str) -> None:
    tale = story(rounds=1, sandbox={"namespace": "sandboxes", "helperImage": "helper:1"})
    tale.into_rollouts()
    if stage == "evaluation":
        tale.done("rollout", "training", "publish", round_number=1)
        tale.carry_out(tale.plan())

    def removed() -> bool:
        return "ServiceAccount" in {ref.kind for ref in tale.plan().remove}

    tale.done(stage, round_number=1)
    tale.see(stage, state=ChildState.WAITING, pods=1)
    assert not removed(), "its last pod has yet to be given a token"
    tale.see(stage, state=ChildState.SUCCEEDED, pods=0)
    assert removed()


def test_the_initial_students_evaluation_is_shown_as_round_0_and_is_the_resolved_rate_until_there_is_a_newer_one(
    story: Callable[..., Story],
) -> None:
    tale = story(evaluation={"initial": True})
    tale.into_rollouts()
    tale.done("rollout", round_number=1)
    assert [one.round for one in tale.plan().status.rounds] == [1], "a round is shown once a stage of it is done"
    tale.done("evaluation")
    status = tale.plan().status
    assert [(one.round, one.policy) for one in status.rounds] == [(0, "r000-base"), (1, "r000-base")]
    initial = status.rounds[0]
    assert initial.evaluation and not (initial.rollout or initial.training) and status.resolved == "27.3%"
    tale.done("training", "publish", "evaluation", round_number=1)
    later = tale.results[1, "evaluation"]
    tale.results[1, "evaluation"] = later.model_copy(update={"summary": later.summary.model_copy(update={"resolved_rate": 0.5})})
    assert tale.plan().status.resolved == "50.0%"


def test_the_status_stays_small_whatever_the_number_of_rounds(story: Callable[..., Story]) -> None:
    tale = story(rounds=1000)
    tale.done("prepare", "preflight")
    for number in range(1, 301):
        tale.done("rollout", "training", "publish", "evaluation", round_number=number)
    status = tale.plan().status
    assert [one.round for one in status.rounds] == list(range(201, 301))
    assert len(status.model_dump_json()) < 150_000
    tale.plan(storage_problem="x" * 100_000)
    assert len(tale.condition("Progressing").message) <= 1024


WAITS = [
    ("Unschedulable", "Warning"),
    ("ErrImagePull", "Warning"),
    ("QuotaExceeded", "Warning"),
    ("NodeLost", "Warning"),
    ("ServersStarting", "Normal"),
    ("SchedulingGated", "Normal"),
]


@pytest.mark.parametrize(("reason", "kind"), WAITS)
def test_a_reason_to_wait_that_no_run_has_by_itself_is_told_as_a_warning(story: Callable[..., Story], reason: str, kind: str) -> None:
    tale = story()
    tale.done("prepare")
    tale.carry_out(tale.plan())
    tale.see("student", state=ChildState.WAITING, trouble=Trouble("StartError", "something else, first"))
    tale.plan()
    tale.see("student", state=ChildState.WAITING, trouble=Trouble(reason, "in its own words"))
    (told,) = tale.plan().events
    assert (told.type, told.reason) == (kind, reason)
    tale.serve()
    assert [event.type for event in tale.plan().events] == ["Normal"]


def test_storage_that_is_away_is_told_as_a_warning(story: Callable[..., Story]) -> None:
    tale = story()
    tale.plan()
    assert [(event.type, event.reason) for event in tale.plan(storage_problem="away").events] == [("Warning", "StorageUnavailable")]
