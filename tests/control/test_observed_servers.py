"""Servers: ready, late, begun again and again, given up."""

from datetime import datetime, timedelta

import pytest

from control.observed import LABELS, NOW, STAGE_SAID, Json, ago, child, deployment, pod, server_pod
from dagger_operator.control import ATTEMPT, COMPONENT, FAILED, Child, ChildState

READY = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1}


def test_a_deployment_is_ready_when_all_replicas_of_this_generation_are() -> None:
    assert child(deployment(**READY)).state is ChildState.READY
    assert child(deployment(generation=2, **READY)).state is ChildState.RUNNING
    assert child(deployment(wanted=2, **READY)).state is ChildState.RUNNING
    assert child(deployment(**READY | {"replicas": 2})).state is ChildState.RUNNING
    scaled_down = child(deployment(wanted=0, **READY))
    assert (scaled_down.state, scaled_down.pods) == (ChildState.SUSPENDED, 1), "it still holds what the last pod holds"


def test_a_server_is_given_up_when_a_retry_would_not_mend_it_or_many_did_not() -> None:
    last = {"terminated": {"exitCode": 1, "message": "CUDA out of memory"}}
    back_off = {"waiting": {"reason": "CrashLoopBackOff"}}
    assert child(deployment(), [server_pod(state=back_off, lastState=last, restartCount=2)]).state is ChildState.WAITING
    looping = child(deployment(), [server_pod(state=back_off, lastState=last, restartCount=5)])
    assert looping.state is ChildState.FAILED
    assert looping.trouble is not None
    assert "CUDA out of memory" in looping.trouble.message
    permanent = {"terminated": {"exitCode": 3, "message": STAGE_SAID}}
    assert child(deployment(), [server_pod(state=back_off, lastState=permanent, restartCount=0)]).state is ChildState.FAILED
    of_another_attempt = server_pod(state=back_off, lastState=permanent, restartCount=9)
    of_another_attempt["metadata"]["labels"][ATTEMPT] = "00000000"
    assert child(deployment(), [of_another_attempt]).state is ChildState.RUNNING


BACK_OFF = {"waiting": {"reason": "CrashLoopBackOff"}}


def served_until(*, code: int = 1, restarts: int = 4, life: timedelta | None = None, **passed: float) -> Child:
    """A server of days whose container ended a while ago, and again just now, after a life of some length (by default unknown)."""
    ended = {"exitCode": code, "message": "CUDA error"}
    if life is not None:
        ended |= {"startedAt": (NOW - life).isoformat(), "finishedAt": NOW.isoformat()}
    one = placed(ago(days=3), unready=ago(**passed))
    one["status"]["containerStatuses"] = [{"name": "vllm", "state": BACK_OFF, "lastState": {"terminated": ended}, "restartCount": restarts}]
    return child(deployment(), [one])


def test_restarts_of_days_that_were_followed_by_service_are_not_counted_against_a_server() -> None:
    assert served_until(restarts=5, seconds=5).state is ChildState.WAITING
    assert served_until(restarts=50, seconds=100).state is ChildState.WAITING, "a kubelet's pauses leave no time for five restarts"
    assert served_until(restarts=50, seconds=200).state is ChildState.FAILED, "five since it last was ready"
    assert served_until(restarts=4, hours=1).state is ChildState.WAITING


@pytest.mark.parametrize(("life", "state"), [(timedelta(minutes=11), ChildState.WAITING), (timedelta(minutes=9), ChildState.FAILED)])
def test_a_life_that_was_longer_than_a_start_may_take_is_no_failed_start(life: timedelta, state: ChildState) -> None:
    assert served_until(restarts=50, life=life, days=3).state is state


def test_the_budget_for_a_service_that_is_away_is_each_outages_own() -> None:
    assert len(served_until(code=75, restarts=50, seconds=100).failures) == 5
    assert len(served_until(code=75, restarts=50, hours=1).failures) == 17
    assert len(served_until(code=75, restarts=3, hours=1).failures) == 4


def test_a_server_that_lacks_a_service_is_waited_for_and_its_ends_are_counted() -> None:
    away = {"terminated": {"exitCode": 75, "message": '{"reason": "ModelUnreachable", "message": "the hub is away"}'}}
    weights = {"name": "weights", "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": away, "restartCount": 9}
    starting = pod("s", "Pending", labels=LABELS | {COMPONENT: "student"}, initContainerStatuses=[weights])
    seen = child(deployment(), [starting])
    assert seen.state is ChildState.WAITING and seen.trouble is not None and "the hub is away" in seen.trouble.message
    assert [failure.reason for failure in seen.failures] == ["ModelUnreachable"] * 10
    starting["status"]["conditions"] = placed(ago(hours=1))["status"]["conditions"]
    given_up = late_server(starting)
    assert given_up.state is ChildState.FAILED and given_up.trouble is not None, "its startup deadline holds all the same"
    assert given_up.trouble.reason == "ModelUnreachable"
    running = {**weights, "state": {"running": {}}}
    assert not child(deployment(), [server_pod(**running)]).failures, "it may have come through"


LATE = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "late"}


COMPLETE_ONCE = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable", "message": "has successfully progressed"}


def late_server(*pods: Json, now: datetime = NOW, progress: Json = LATE) -> Child:
    """A server with 30 minutes to start, which its Deployment says are over, or reckons with no more."""
    manifest = deployment(wanted=len(pods), conditions=[progress])
    manifest["spec"]["progressDeadlineSeconds"] = 1800
    return child(manifest, pods, now)


def placed(since: str, *, unready: str | None = None, ready: bool = False) -> Json:
    conditions = [
        {"type": "PodScheduled", "status": "True", "lastTransitionTime": since},
        {"type": "Ready", "status": str(ready), "lastTransitionTime": unready or since},
    ]
    return pod("s", labels=LABELS | {COMPONENT: "student"}, conditions=conditions)


def test_a_server_past_its_deadline_failed_unless_it_waits_for_room() -> None:
    assert late_server(placed(ago(minutes=31))).state is ChildState.FAILED
    untimed = pod("s", conditions=[{"type": "Ready", "status": "False"}])
    del untimed["metadata"]["creationTimestamp"]
    assert late_server(untimed).state is ChildState.FAILED, "as one machine says it, where nothing waits for room"
    no_room = pod("s", "Pending", conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"}])
    assert late_server(no_room).state is ChildState.WAITING
    assert late_server().state is not ChildState.FAILED, "a quota refuses its pods: nothing of it has begun"


def test_a_server_that_waited_for_its_turn_has_all_its_time_from_then_on() -> None:
    begun = placed(ago(seconds=5))
    assert late_server(begun).state is ChildState.RUNNING
    assert late_server(begun, now=NOW + timedelta(minutes=29)).state is ChildState.RUNNING
    assert late_server(begun, now=NOW + timedelta(minutes=31)).state is ChildState.FAILED
    serves = placed(ago(hours=1), ready=True)
    assert late_server(serves, begun).state is ChildState.RUNNING, "the first replica had room, the second one waited"
    changes_weights = placed(ago(hours=1), unready=ago(seconds=5))
    assert late_server(changes_weights, begun).state is ChildState.RUNNING


def test_a_server_that_is_scaled_back_up_has_the_same_time_though_its_deployment_was_complete_once() -> None:
    again = placed(ago(minutes=31))
    failed = late_server(again, progress=COMPLETE_ONCE)
    assert failed.state is ChildState.FAILED and failed.trouble is not None
    assert failed.trouble.reason == "ProgressDeadlineExceeded"
    assert all(part in failed.trouble.message for part in ("pod s ", "1800 s", "spec.student.serving.startupDeadlineSeconds"))
    assert late_server(placed(ago(minutes=29)), progress=COMPLETE_ONCE).state is ChildState.RUNNING
    assert late_server(placed(ago(hours=9), unready=ago(seconds=5)), progress=COMPLETE_ONCE).state is ChildState.RUNNING
    first = {"type": "Progressing", "status": "True", "reason": "ReplicaSetUpdated"}
    assert late_server(again, progress=first).state is ChildState.RUNNING, "it reckons with its progress: another replica has just come"


@pytest.mark.parametrize("progress", [LATE, COMPLETE_ONCE])
def test_a_server_that_is_late_fails_with_what_its_container_said_last(progress: Json) -> None:
    again = placed(ago(minutes=31))
    killed = {"terminated": {"exitCode": 137, "reason": "Error", "message": "probe failed"}}
    again["status"]["containerStatuses"] = [{"name": "vllm", "state": {"running": {}}, "lastState": killed, "restartCount": 3}]
    failed = late_server(again, progress=progress)
    assert failed.state is ChildState.FAILED and failed.trouble is not None
    assert "exit code 137" in failed.trouble.message


def test_a_server_that_starts_again_and_again_says_why_while_it_runs() -> None:
    killed = {"terminated": {"exitCode": 137, "reason": "Error", "message": "no answer"}}
    seen = child(deployment(), [server_pod(state={"running": {}}, lastState=killed, restartCount=3)])
    assert seen.state is ChildState.RUNNING and seen.trouble is not None
    assert all(part in seen.trouble.message for part in ("container vllm", "exit code 137", "no answer", "restarts so far: 3"))
    assert child(deployment(**READY), [server_pod(state={"running": {}}, lastState=killed, restartCount=3)]).trouble is None


def test_a_given_up_server_is_known_by_its_annotation_alone() -> None:
    seen = child(deployment(wanted=0, annotations={FAILED: STAGE_SAID}))
    assert seen.state is ChildState.FAILED
    assert seen.trouble is not None
    assert seen.trouble.reason == "LabelCoverageTooLow"


def test_a_group_of_nodes_is_observed_as_a_server_is() -> None:
    group = deployment(**{name: count for name, count in READY.items() if name != "observedGeneration"})
    group |= {"kind": "LeaderWorkerSet"}
    assert child(group).state is ChildState.READY
    assert child(group | {"spec": {"replicas": 0}}).state is ChildState.SUSPENDED
