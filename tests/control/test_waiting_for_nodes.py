"""Servers that wait for nodes, in a queue or a full cluster: what needs them waits as long, says why, and spends no budget."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from control.observed import LABELS, NOW, Json, ago, child, deployment, pod
from dagger_operator.api import Phase
from dagger_operator.control import COMPONENT, ChildState, Plan, PodFailure, Trouble

Wanted = Callable[[Plan], dict[tuple[str, str], Any]]
Story = Any
NO_ROOM = Trouble("Unschedulable", "pod demo-student-x: 0/3 nodes have nvidia.com/gpu")
IN_QUEUE = Trouble("SchedulingGated", "pod demo-student-x: not admitted yet")
PATIENCE = timedelta(seconds=1800)
"""`startupDeadlineSeconds` by default."""


def after_training(tale: Story) -> None:
    """Training of round 1 is over, the servers that left it their GPUs are wanted again, and publish is made beside them."""
    tale.into_rollouts()
    tale.done("rollout", "training", round_number=1)
    tale.see("rollout", state=ChildState.SUCCEEDED, pods=0)
    tale.see("student", state=ChildState.SUSPENDED, pods=0)
    tale.carry_out(tale.plan())
    tale.see("student", state=ChildState.RUNNING, pods=2)


@pytest.mark.parametrize(("kueue", "trouble"), [(None, NO_ROOM), ({"queueName": "gpus"}, IN_QUEUE)])
def test_publish_waits_for_the_students_nodes_and_the_run_says_what_they_wait_for(
    story: Callable[..., Story], wanted: Wanted, kueue: Json | None, trouble: Trouble
) -> None:
    tale = story(gpuSharing="TimeShared", kueue=kueue)
    after_training(tale)
    begun = tale.see("publish", state=ChildState.RUNNING)
    tale.see("student", state=ChildState.WAITING, trouble=trouble, unplaced=trouble)
    held = tale.plan()
    assert (held.status.phase, held.status.reason) == (Phase.PUBLISHING, trouble.reason)
    assert trouble.message in tale.condition("Progressing").message
    if kueue is None:
        assert wanted(held)["Job", "publish"]["spec"]["suspend"] is True
    else:
        assert ("Job", "publish") not in wanted(held) and begun.ref in held.remove, "a queue would start it again"
    assert wanted(held)["Deployment", "student"]["spec"]["replicas"] == 2
    tale.carry_out(held)
    tale.later(hours=30)
    assert tale.plan().status.reason == trouble.reason
    tale.see("student", state=ChildState.RUNNING, trouble=None, unplaced=None)
    going_on = tale.plan()
    assert "suspend" not in wanted(going_on)["Job", "publish"]["spec"], "the student may need the new weights to become ready"
    assert going_on.status.phase is Phase.PUBLISHING


def test_publish_does_not_wait_for_a_student_that_has_its_nodes_and_only_breaks_nor_for_the_teacher(
    story: Callable[..., Story], wanted: Wanted
) -> None:
    tale = story(teacher={"model": "t", "serving": {"gpus": 4}})
    after_training(tale)
    tale.see("student", state=ChildState.WAITING, trouble=Trouble("CrashLoopBackOff", "the old weights do not load"))
    tale.see("teacher", state=ChildState.WAITING, trouble=NO_ROOM, unplaced=NO_ROOM)
    assert "suspend" not in wanted(tale.plan())["Job", "publish"]["spec"]


def test_a_publish_that_succeeded_is_left_alone_though_the_student_lost_its_node_just_then(
    story: Callable[..., Story], wanted: Wanted
) -> None:
    tale = story(kueue={"queueName": "gpus"})
    after_training(tale)
    ended = tale.see("publish", state=ChildState.SUCCEEDED, pods=0)
    tale.see("student", state=ChildState.WAITING, trouble=NO_ROOM, unplaced=NO_ROOM)
    assert ended.ref not in tale.plan().remove, "its result will be visible soon"


@pytest.mark.parametrize(
    ("stage", "reason", "role"),
    [("publish", "PolicyNotServed", "student"), ("rollout", "StudentNotServed", "student"), ("rollout", "TeacherNotServed", "teacher")],
)
def test_waiting_in_vain_for_servers_without_nodes_costs_nothing_and_with_nodes_it_does(
    story: Callable[..., Story], stage: str, reason: str, role: str
) -> None:
    tale = story(teacher={"model": "t", "serving": {"gpus": 4}}, failurePolicy={"infrastructureRetries": 2})
    if stage == "publish":
        after_training(tale)
    else:
        tale.into_rollouts()
    began = tale.now

    def waits(times: int) -> None:
        """Its pod waits that often until the deadline."""
        for _ in range(times):
            tale.now += PATIENCE + timedelta(seconds=5)
            failed.append(PodFailure(reason, "not served after 1800 s", exit_code=75, index="0", at=tale.now))
        tale.see(stage, state=ChildState.RUNNING, failures=tuple(failed))

    failed: list[PodFailure] = []
    waits(9)
    tale.see(role, placed=began)
    assert tale.plan(told=False).status.phase is Phase.FAILED, "it had its node all the time"
    tale.see(role, state=ChildState.WAITING, trouble=NO_ROOM, unplaced=NO_ROOM, placed=None)
    assert tale.plan(told=False).status.phase is not Phase.FAILED
    # It got its node half an hour after it was asked for: the time before that is still not counted.
    tale.see(role, state=ChildState.RUNNING, trouble=None, unplaced=None, placed=tale.now)
    assert tale.plan(told=False).status.phase is not Phase.FAILED
    waits(2)
    assert tale.plan(told=False).status.phase is not Phase.FAILED
    waits(1)
    given_up = tale.plan(told=False).status
    assert (given_up.phase, given_up.reason) == (Phase.FAILED, reason)
    assert "3 pods of index 0 failed" in next(one.message for one in given_up.conditions if one.type == "Failed")


def test_what_else_ends_a_worker_counts_whatever_its_servers_wait_for(story: Callable[..., Story]) -> None:
    tale = story(failurePolicy={"infrastructureRetries": 2})
    tale.into_rollouts()
    away = PodFailure("StorageUnavailable", "connection refused", exit_code=75, index="0", at=tale.now)
    tale.see("rollout", failures=(away,) * 3)
    tale.see("student", state=ChildState.WAITING, trouble=NO_ROOM, unplaced=NO_ROOM)
    assert tale.plan().status.reason == "StorageUnavailable"


NOWHERE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes", "lastTransitionTime": ago(hours=1)}


def student(made: str, *conditions: Json, **metadata: str) -> Json:
    one = pod("s", "Pending", labels=LABELS | {COMPONENT: "student"}, conditions=list(conditions))
    one["metadata"] |= {"creationTimestamp": made, **metadata}
    return one


def on_a_node(made: str, since: str) -> Json:
    return student(made, {"type": "PodScheduled", "status": "True", "lastTransitionTime": since})


def test_a_server_lacks_a_node_while_one_of_its_pods_does() -> None:
    seen = child(deployment(wanted=2), [on_a_node(ago(hours=3), ago(hours=2)), student(ago(hours=1), NOWHERE)])
    assert seen.unplaced is not None and seen.unplaced.reason == "Unschedulable" and seen.placed is None
    pulls = student(ago(hours=1))
    pulls["status"]["containerStatuses"] = [{"name": "vllm", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]
    assert child(deployment(), [pulls]).unplaced is None, "it has one, and its own deadline runs"


def test_a_server_has_had_its_nodes_since_the_last_of_its_pods_was_placed() -> None:
    first, second = on_a_node(ago(hours=9), ago(hours=8)), on_a_node(ago(hours=3), ago(hours=2))
    assert child(deployment(wanted=2), [first, second]).placed == NOW - timedelta(hours=2)
    new = student(ago(seconds=1))
    assert child(deployment(wanted=2), [first, new]).placed == NOW - timedelta(seconds=1), "the scheduler has not looked at it yet"
    assert child(deployment(wanted=2), [first]).placed is None, "a preempted pod has no successor yet"
    ends = student(ago(hours=9), deletionTimestamp=ago(seconds=1))
    assert child(deployment(), [ends]).placed is None
    assert child(deployment(wanted=0)).placed is None


def test_the_nodes_of_a_group_are_all_waited_for() -> None:
    group = deployment(wanted=1) | {"kind": "LeaderWorkerSet"}
    group["spec"]["leaderWorkerTemplate"] = {"size": 2}
    first, second = on_a_node(ago(hours=9), ago(hours=8)), on_a_node(ago(hours=3), ago(hours=2))
    assert child(group, [first]).placed is None
    assert child(group, [first, second]).placed == NOW - timedelta(hours=2)


def test_a_pods_failure_carries_the_time_of_its_end() -> None:
    container = {"name": "stage", "state": {"terminated": {"exitCode": 75, "finishedAt": ago(minutes=5)}}}
    (failure,) = child(JOB, [pod(phase="Failed", containers=[container])]).failures
    assert failure.at == NOW - timedelta(minutes=5)


JOB: Json = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "demo-r002-rollout-abcd1234", "uid": "j", "labels": LABELS},
    "spec": {},
}
