"""Budgets, deadlines and rules: when a run fails, what it says, and what it keeps."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from dagger_operator.api import Phase
from dagger_operator.control import COMPONENT, FAILED, ChildState, Observed, Plan, PodFailure, Results, Trouble, child, plan
from dagger_operator.control.jobs import build_job
from dagger_operator.control.refusals import dated, failed_by
from dagger_operator.control.rounds import StageName, Step

Wanted = Callable[[Plan], dict[tuple[str, str], Any]]
Story = Any
AWAY = PodFailure("StorageUnavailable", "connection refused", exit_code=75)
EVICTED = PodFailure("Evicted", "node drained", disrupted=True)
BROKEN = PodFailure("Unexpected", "KeyError: x", exit_code=1)
OUT_OF_MEMORY = PodFailure("OOMKilled", "exit code 137", exit_code=137)
ROLLOUT = Step(1, StageName.ROLLOUT)


def rules(run: Any, step: Step = ROLLOUT) -> Any:
    return build_job(run, step, Results())["spec"]["podFailurePolicy"]["rules"]


def test_what_infrastructure_ends_has_a_budget_of_its_own_and_then_fails_the_run(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(failurePolicy={"infrastructureRetries": 2})
    tale.into_rollouts()
    tale.see("rollout", failures=(AWAY, EVICTED))
    assert tale.plan().status.phase is Phase.ROLLOUT
    tale.see("rollout", failures=(BROKEN,) * 18)
    assert tale.plan().status.phase is Phase.ROLLOUT, "own faults are counted apart"
    tale.see("rollout", failures=(AWAY, EVICTED, AWAY))
    failed = tale.plan()
    assert (failed.status.phase, failed.status.reason) == (Phase.FAILED, "StorageUnavailable")
    assert "3 pods failed, failurePolicy.infrastructureRetries allows 2" in tale.condition("Failed").message
    given_up = wanted(failed)["Job", "rollout"]
    assert (given_up["spec"]["suspend"], given_up["spec"]["activeDeadlineSeconds"]) == (True, 1)
    # Its pods are collected, and a controller that knows nothing else comes to the same end.
    tale.children["Job", given_up["metadata"]["name"]] = child(given_up, (), tale.now)
    tale.run = tale.run.model_copy(update={"status": None})
    assert (tale.plan().status.phase, tale.plan().status.reason) == (Phase.FAILED, "StorageUnavailable")


def test_an_outage_that_ends_all_workers_costs_each_of_them_one_retry(story: Callable[..., Story]) -> None:
    tale = story(rollouts={"workers": 32}, failurePolicy={"infrastructureRetries": 2})
    tale.into_rollouts()

    def outages(times: int) -> tuple[PodFailure, ...]:
        return tuple(replace(AWAY, index=f"{index}") for index in range(32)) * times

    tale.see("rollout", failures=outages(2))
    assert tale.plan().status.phase is Phase.ROLLOUT
    tale.see("rollout", failures=(*outages(2), replace(AWAY, index="7")))
    assert tale.plan().status.phase is Phase.FAILED
    assert "3 pods of index 7 failed, failurePolicy.infrastructureRetries allows 2" in tale.condition("Failed").message
    tale.see("rollout", failures=tuple(replace(BROKEN, index=f"{index}") for index in range(193)) + outages(1))
    assert "193 pods failed, the stage's own retries allows 192" in tale.plan(told=False).status.conditions[-1].message


def test_a_server_that_lacks_a_service_has_the_budget_of_infrastructure(story: Callable[..., Story]) -> None:
    tale = story(failurePolicy={"infrastructureRetries": 2})
    tale.into_rollouts()
    waits = Trouble("CrashLoopBackOff", "back-off")
    tale.see("student", state=ChildState.WAITING, trouble=waits, failures=(AWAY,) * 2)
    assert tale.plan().status.phase is Phase.ROLLOUT
    tale.see("student", failures=(AWAY,) * 3)
    assert (tale.plan().status.phase, tale.plan().status.reason) == (Phase.FAILED, "StorageUnavailable")
    assert (
        "3 starts failed, failurePolicy.infrastructureRetries allows 2; the last one: connection refused"
        in tale.condition("Failed").message
    )


def test_the_job_controller_is_told_which_failures_count(story: Callable[..., Story]) -> None:
    actions = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in rules(story().run)]
    assert actions == [("FailJob", [3]), ("Ignore", [75]), ("Ignore", None)]


def test_the_first_rule_that_matches_decides(story: Callable[..., Story]) -> None:
    given = [
        {"stages": ["Training"], "exitCodes": [137], "action": "FailRun"},
        {"exitCodes": [9, 137], "action": "RetryWithoutCounting"},
        {"exitCodes": [3], "action": "Retry"},
    ]
    tale = story(failurePolicy={"rules": given})
    assert [(rule["action"], rule["onExitCodes"]["values"]) for rule in rules(tale.run)[:2]] == [("Ignore", [9, 137]), ("Count", [3])]
    assert rules(tale.run, Step(1, StageName.TRAINING))[0] == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "stage", "operator": "In", "values": [137]},
    }


def test_a_rule_by_reason_is_decided_by_the_plan(story: Callable[..., Story]) -> None:
    tale = story(failurePolicy={"infrastructureRetries": 4, "rules": [{"reasons": ["OOMKilled"], "action": "FailRun"}]})
    tale.into_rollouts()
    spec = build_job(tale.run, ROLLOUT, Results())["spec"]
    assert "podFailurePolicy" not in spec, "what comes after the rule is the plan's to decide as well"
    assert spec["backoffLimit"] == (6 + 4) * 3
    tale.see("rollout", failures=(BROKEN,) * 18)
    assert tale.plan().status.phase is Phase.ROLLOUT
    tale.see("rollout", failures=(BROKEN,) * 19)
    assert "the stage's own retries allows 18" in tale.plan(told=False).status.conditions[-1].message
    tale.see("rollout", failures=(OUT_OF_MEMORY,))
    assert tale.plan().status.reason == "OOMKilled"


def test_what_happens_to_one_of_many_nodes_costs_a_training_one_retry(story: Callable[..., Story]) -> None:
    tale = story(training={"nodes": 8, "retries": 3}, failurePolicy={"infrastructureRetries": 4})
    tale.done("prepare", "preflight")
    tale.done("rollout", round_number=1)
    tale.carry_out(tale.plan())
    tale.carry_out(tale.plan())

    def struck(first: PodFailure, times: int) -> tuple[PodFailure, ...]:
        """One node fails so often, and all others lose it."""
        nodes = [first, *[PodFailure("PeerLost", "connection closed", exit_code=75)] * 7]
        return tuple(replace(failure, index=f"{index}") for index, failure in enumerate(nodes)) * times

    for enough, cause in ((4, EVICTED), (3, BROKEN)):
        tale.see("training", failures=struck(cause, enough))
        assert tale.plan(told=False).status.phase is Phase.TRAINING
        tale.see("training", failures=struck(cause, enough + 1))
        failed = tale.plan(told=False).status
        assert (failed.phase, failed.reason) == (Phase.FAILED, cause.reason)
    spec = build_job(tale.run, Step(1, StageName.TRAINING), Results())["spec"]
    assert spec["backoffLimit"] == 3 * 8, "the controller counts every pod"


def test_a_run_fails_when_its_time_is_over_and_goes_on_when_it_is_given_more(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(activeDeadlineSeconds=3600)
    tale.into_rollouts()
    tale.later(minutes=59)
    assert tale.plan().status.phase is Phase.ROLLOUT
    tale.later(minutes=2)
    late = tale.plan()
    assert (late.status.phase, late.status.reason) == (Phase.FAILED, "ActiveDeadlineExceeded")
    assert "raise activeDeadlineSeconds" in tale.condition("Failed").message
    assert wanted(late)["Job", "rollout"]["spec"]["suspend"] is True
    assert tale.plan().status == late.status
    tale.edit(activeDeadlineSeconds=7200)
    assert tale.plan().status.phase is Phase.ROLLOUT


def test_a_suspended_run_is_looked_at_when_its_time_is_over(story: Callable[..., Story]) -> None:
    tale = story(activeDeadlineSeconds=3600, suspend=True)
    assert tale.plan().requeue_after == 3600
    tale.later(minutes=59)
    assert (tale.plan().status.phase, tale.plan().requeue_after) == (Phase.SUSPENDED, 60)
    tale.later(minutes=1)
    assert (tale.plan().status.phase, tale.plan().status.reason) == (Phase.FAILED, "ActiveDeadlineExceeded")
    tale.edit(activeDeadlineSeconds=None)
    assert (tale.plan().status.phase, tale.plan().requeue_after) == (Phase.SUSPENDED, None)


@pytest.mark.parametrize(("keep", "zero"), [("Logs", True), ("Everything", False)])
def test_a_run_fails_when_its_time_is_over_though_its_storage_is_away(
    story: Callable[..., Story], wanted: Wanted, keep: str, zero: bool
) -> None:
    tale = story(activeDeadlineSeconds=3600, ttlSecondsAfterFinished=600, failurePolicy={"keep": keep})
    tale.into_rollouts()
    tale.later(minutes=59)
    assert tale.plan(storage_problem="away").status.reason == "StorageUnavailable"
    tale.later(minutes=1)
    late = tale.plan(storage_problem="away")
    assert (late.status.phase, late.status.reason, late.status.round) == (Phase.FAILED, "ActiveDeadlineExceeded", 1)
    assert tale.condition("Failed").status == "True"
    assert "raise activeDeadlineSeconds" in tale.condition("Failed").message
    assert [ref.kind for ref in late.remove] == ["Job"], "its stage does what is left when it is made again"
    assert [one["spec"]["replicas"] for one in late.objects] == ([0] if zero else [])
    tale.later(minutes=9)
    again = tale.plan(storage_problem="still away")
    assert (again.status, again.events, again.remove, again.expired) == (late.status, (), late.remove, False)
    assert again.status.completion_time == late.status.completion_time
    tale.later(minutes=1)
    assert tale.plan(told=False, storage_problem="away").expired
    tale.edit(activeDeadlineSeconds=7200)
    assert tale.plan().status.phase is Phase.ROLLOUT


def test_a_failure_that_came_before_stays_the_reason_when_storage_is_away_and_time_is_over(story: Callable[..., Story]) -> None:
    tale = story(activeDeadlineSeconds=3600)
    tale.into_rollouts()
    tale.see("rollout", state=ChildState.FAILED, pods=0, trouble=Trouble("Broken", "mend it"))
    tale.plan()
    tale.later(hours=2)
    tale.plan(storage_problem="away")
    assert tale.condition("Failed").reason == "Broken"


@pytest.mark.parametrize("who", ["rollout", "student"])
def test_a_run_fails_when_something_waited_too_long_with_the_pod_s_reason(story: Callable[..., Story], wanted: Wanted, who: str) -> None:
    tale = story(preRunningDeadlineSeconds=600)
    tale.into_rollouts()
    pulling = Trouble("ImagePullBackOff", "pod x: manifest unknown", tale.now)
    tale.see(who, state=ChildState.WAITING, trouble=pulling, waiting_since=tale.now)
    tale.later(minutes=9)
    assert tale.plan().status.phase is Phase.ROLLOUT
    tale.later(minutes=2)
    failed = tale.plan()
    assert (failed.status.phase, failed.status.reason) == (Phase.FAILED, "ImagePullBackOff")
    kind = "Job" if who == "rollout" else "Deployment"
    noted = wanted(failed)[kind, who]
    assert "manifest unknown" in noted["metadata"]["annotations"][FAILED]
    tale.children[kind, noted["metadata"]["name"]] = child(noted, (), tale.now)
    assert (tale.plan().status.phase, tale.plan().status.reason) == (Phase.FAILED, "ImagePullBackOff"), "it waits no more, and did fail"


@pytest.mark.parametrize("holder", ["student", "rollout", "an earlier rollout"])
def test_a_step_waits_for_what_a_lost_node_holds_says_so_and_fails_in_time(
    story: Callable[..., Story], wanted: Wanted, holder: str
) -> None:
    tale = story(gpuSharing="TimeShared", preRunningDeadlineSeconds=600)
    tale.into_rollouts()
    lost = {
        "pods": 1,
        "lost": Trouble("NodeLost", "pod p was to end, and its node gpu-7 does not say that it did", tale.now - timedelta(hours=5)),
    }
    if holder == "student":
        tale.see("rollout", state=ChildState.SUCCEEDED, pods=0)
        tale.done("rollout", round_number=1)
        tale.see("student", state=ChildState.SUSPENDED, **lost)
        step, held = "training", "still held by Deployment demo-student"
    elif holder == "rollout":
        tale.see("rollout", state=ChildState.SUSPENDED, deleting=True, **lost)
        step, held = "rollout", "is being deleted"
    else:
        tale.see("rollout", **lost)
        tale.edit(rollouts={"workers": 5})
        step, held = "rollout", "an earlier attempt has not stopped yet: Job demo-"
    waits = tale.plan()
    assert ("Job", step) not in wanted(waits)
    assert (waits.status.phase.lower(), waits.status.reason) == (step, "NodeLost")
    said = tale.condition("Progressing").message
    assert held in said and "its node gpu-7" in said and "(since 2026-01-01 00:00:00 UTC)" in said, "since it is in the way"
    tale.later(minutes=9)
    assert tale.plan().status.reason == "NodeLost"
    tale.later(minutes=2)
    assert tale.plan().status.phase is Phase.FAILED
    failed = tale.plan()
    assert (failed.status.phase, failed.status.reason) == (Phase.FAILED, "NodeLost")
    assert tale.condition("Failed").message.endswith("; preRunningDeadlineSeconds is 600")
    tale.edit(suspend=True)
    assert tale.plan().status.phase is Phase.SUSPENDED, "then nothing waits"
    tale.edit(suspend=False)
    tale.children = {key: replace(one, pods=0, lost=None) for key, one in tale.children.items() if one.kind != "Job"}
    assert tale.plan().status.phase is not Phase.FAILED, "it goes on by itself"


def test_an_object_that_the_api_server_refuses_is_said_and_asked_for_again(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(preRunningDeadlineSeconds=600)
    tale.done("prepare")
    refused = Trouble("QuotaExceeded", "Deployment demo-student: exceeded quota: gpus", tale.now)
    waiting = tale.plan(refused=refused)
    assert (waiting.status.phase, waiting.status.reason) == (Phase.PREFLIGHT, "QuotaExceeded")
    assert tale.condition("Progressing").status == "False"
    assert "ask for less: spec.rollouts.pod.resources" in tale.condition("Progressing").message
    assert ("Deployment", "student") in wanted(waiting)
    tale.later(minutes=11)
    failed = tale.plan(refused=refused)
    assert (failed.status.phase, failed.status.reason) == (Phase.FAILED, "QuotaExceeded")
    asked = {(one["kind"], one["metadata"]["name"]): one for one in failed.asked}
    assert asked["Deployment", "demo-student"]["spec"]["replicas"] == 2, "once it would be taken the run goes on"
    assert asked.keys() >= {("Service", "demo-student"), ("NetworkPolicy", "demo-serving")}
    assert wanted(failed) == {}, "and before that nothing is made"
    assert tale.plan().status.phase is Phase.PREFLIGHT


@pytest.mark.parametrize("kueue", [None, {"queueName": "gpus"}], ids=["no queue", "in a queue"])
@pytest.mark.parametrize("keep", ["Logs", "Everything", "Nothing"])
@pytest.mark.parametrize("lacks", ["teacher", "evaluation"])
def test_a_run_that_failed_by_a_refusal_comes_to_rest(story: Callable[..., Story], lacks: str, keep: str, kueue: Any) -> None:
    served = {"gpus": 1, "replicas": 2}
    tale = story(
        student={"model": "m", "serving": served},
        teacher={"model": "t", "serving": served},
        preRunningDeadlineSeconds=600,
        failurePolicy={"keep": keep},
        kueue=kueue,
    )
    tale.into_rollouts()
    tale.done("rollout", "training", "publish", round_number=1)
    tale.children = {key: one for key, one in tale.children.items() if one.kind != "Job"}
    tale.carry_out(tale.plan())
    tale.children = {key: one for key, one in tale.children.items() if one.component != lacks}
    refused = Trouble("Forbidden", "no more of these", tale.now)
    limited = "Deployment" if lacks == "teacher" else "Job"

    def there() -> int:
        return sum(one.kind == limited for one in tale.children.values())

    quota = there()
    tale.later(minutes=11)
    looks = []
    for _ in range(6):
        planned = tale.plan(refused=refused)
        assert planned.status.phase is Phase.FAILED
        tale.carry_out(planned)
        new = [one for one in planned.asked if (one["kind"], one["metadata"]["name"]) not in tale.children]
        assert any(one["kind"] == limited for one in new) and there() >= quota, "the dry run is refused again"
        tale.later(seconds=10)
        looks.append(dict(tale.children))
    assert all(one == looks[1] for one in looks[2:]), "nothing is made that the next look removes"
    assert not any(one.component == lacks for one in tale.children.values())
    holding = {(one.kind, one.component) for one in tale.children.values() if one.pods or one.state is ChildState.RUNNING}
    left_up = {("Deployment", "student"), ("Deployment", "teacher")} if keep == "Everything" else set()
    at_work = {("Job", "rollout"), ("Job", "evaluation")} if kueue else set()
    assert holding == {(kind, who) for kind, who in left_up | at_work if who != lacks}
    assert lacks in {one["metadata"]["labels"][COMPONENT] for one in planned.asked}
    assert tale.plan(told=False).status.phase is Phase.ROLLOUT, "it is taken now"
    tale.edit(suspend=True)
    tale.carry_out(tale.plan(refused=refused))
    assert not any(one.pods for one in tale.children.values()), "whoever suspends wants the GPUs back"


def test_since_when_an_object_is_refused_is_read_from_the_status(story: Callable[..., Story]) -> None:
    tale = story(preRunningDeadlineSeconds=600)
    tale.done("prepare")
    tale.plan()
    tale.later(hours=1)
    first = Trouble("QuotaExceeded", "Deployment demo-student: exceeded quota", tale.now)
    assert dated(first, None, tale.run.status).since == tale.now, "it waited for other things before"
    tale.plan(refused=first)
    assert failed_by(tale.run.status) is None
    tale.later(minutes=5)
    again = Trouble("QuotaExceeded", "Deployment demo-student: exceeded quota", tale.now)
    assert dated(again, None, tale.run.status).since == first.since
    other = Trouble("InternalError", "failed calling webhook", tale.now)
    assert dated(other, first, tale.run.status).since == other.since
    tale.later(minutes=6)
    assert tale.plan(refused=dated(again, None, tale.run.status)).status.phase is Phase.FAILED
    known = failed_by(tale.run.status)
    assert (known.reason, known.since) == ("QuotaExceeded", first.since)
    assert dated(other, None, tale.run.status).since == first.since, "it fails until the object is taken"


@pytest.mark.parametrize(("keep", "replicas"), [("Logs", 0), ("Everything", 2), ("Nothing", None)])
def test_what_is_kept_of_a_run_that_failed(story: Callable[..., Story], wanted: Wanted, keep: str, replicas: int | None) -> None:
    tale = story(failurePolicy={"keep": keep})
    tale.into_rollouts()
    job = tale.see("rollout", state=ChildState.FAILED, pods=0, trouble=Trouble("Broken", "mend it"))
    failed = tale.plan()
    server = wanted(failed).get(("Deployment", "student"))
    assert (server["spec"]["replicas"] if server else None) == replicas
    gone = {ref.name for ref in failed.remove}
    assert gone == ({"demo-student", "demo-serving"} if keep == "Nothing" else set())
    tale.carry_out(failed)
    assert ("Job", job.name) in tale.children, "the failed Job is what remembers the failure"
    assert tale.plan().status == failed.status


def test_a_failed_run_that_is_suspended_holds_nothing_whatever_it_kept(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(failurePolicy={"keep": "Everything"})
    tale.into_rollouts()
    tale.see("student", state=ChildState.FAILED, trouble=Trouble("Broken", "mend it"))
    assert wanted(tale.plan())["Deployment", "student"]["spec"]["replicas"] == 2
    tale.edit(suspend=True)
    suspended = tale.plan()
    assert wanted(suspended)["Deployment", "student"]["spec"]["replicas"] == 0
    assert (suspended.status.phase, suspended.status.reason) == (Phase.FAILED, "Broken"), "what has to be mended is still said"


def test_in_a_queue_a_job_waits_for_its_turn_and_suspension_takes_it_out(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(kueue={"queueName": "gpus"}, preRunningDeadlineSeconds=60)
    tale.into_rollouts()
    job = tale.see("rollout", state=ChildState.SUSPENDED, pods=0)
    tale.later(hours=5)
    waiting = tale.plan()
    assert (waiting.status.phase, waiting.status.reason) == (Phase.ROLLOUT, "WaitingInQueue")
    assert "suspend" not in wanted(waiting)["Job", "rollout"]["spec"]
    tale.edit(suspend=True)
    held = tale.plan()
    assert job.ref in held.remove
    assert ("Job", "rollout") not in wanted(held)


def test_a_budget_that_is_spent_in_a_queue_ends_the_job_without_suspending_it(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story(kueue={"queueName": "gpus"}, failurePolicy={"infrastructureRetries": 0})
    tale.into_rollouts()
    tale.see("rollout", failures=(AWAY,))
    spec = wanted(tale.plan())["Job", "rollout"]["spec"]
    assert ("suspend" in spec, spec["activeDeadlineSeconds"]) == (False, 1)


def test_a_failed_run_looks_the_same_whenever_it_is_asked(story: Callable[..., Story]) -> None:
    tale = story(activeDeadlineSeconds=60)
    tale.into_rollouts()
    tale.later(minutes=5)
    first = tale.plan()
    observed = Observed(tale.now + timedelta(days=3), tuple(tale.children.values()), Results(dict(tale.results)))
    assert plan(tale.run, observed).status == first.status
