"""Children mirror what their pods say, so that a condition can say why a run waits."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dagger_operator import control
from dagger_operator.control import ATTEMPT, COMPONENT, FAILED, ROUND, Child, ChildState, Trouble
from dagger_operator.control.names import COMPLETION_INDEX

Json = dict[str, Any]
NOW = datetime(2026, 1, 1, 2, tzinfo=UTC)
LABELS = {COMPONENT: "rollout", ROUND: "2", ATTEMPT: "abcd1234"}


def child(manifest: Json, pods: Sequence[Json] = (), now: datetime = NOW) -> Child:
    return control.child(manifest, pods, now)


def children(objects: Sequence[Json], pods: Sequence[Json], warnings: Mapping[tuple[str, str], Trouble] = {}) -> tuple[Child, ...]:
    return control.children(objects, pods, NOW, warnings)


def ago(**passed: float) -> str:
    return (NOW - timedelta(**passed)).isoformat()


def job(*, spec: Json | None = None, **status: Any) -> Json:
    metadata = {"name": "demo-r002-rollout-abcd1234", "uid": "j", "labels": LABELS}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec or {}, "status": status}


def deployment(*, wanted: int = 1, annotations: Json | None = None, generation: int = 1, **status: Any) -> Json:
    metadata = {"name": "demo-student", "labels": LABELS | {COMPONENT: "student"}, "generation": generation, "annotations": annotations}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": {"replicas": wanted}, "status": status}


def pod(
    name: str = "p", phase: str = "Running", *, labels: Json | None = None, containers: list[Json] | None = None, **status: Any
) -> Json:
    metadata = {"name": name, "labels": labels or LABELS, "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"kind": "Pod", "metadata": metadata, "status": {"phase": phase, "containerStatuses": containers or [], **status}}


def ended(code: int, message: str = "", *, at: str = "2026-01-01T00:00:00Z", **more: Any) -> Json:
    return {"name": "stage", "state": {"terminated": {"exitCode": code, "message": message, "finishedAt": at, **more}}}


def waiting(reason: str, message: str = "", **more: Any) -> Json:
    return {"name": "stage", "state": {"waiting": {"reason": reason, "message": message}}, **more}


STAGE_SAID = json.dumps({"reason": "LabelCoverageTooLow", "message": "raise labels.attempts"})


def test_a_job_is_waiting_running_suspended_succeeded_or_failed() -> None:
    assert child(job()).state is ChildState.WAITING
    assert child(job(), [pod()]).state is ChildState.RUNNING
    assert child(job(spec={"suspend": True})).state is ChildState.SUSPENDED
    complete = {"type": "Complete", "status": "True", "lastTransitionTime": "2026-01-01T00:00:09Z"}
    done = child(job(conditions=[complete]))
    assert (done.state, done.finished) == (ChildState.SUCCEEDED, datetime(2026, 1, 1, 0, 0, 9, tzinfo=UTC))
    failed = child(job(conditions=[{"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "too late"}]))
    assert failed.state is ChildState.FAILED
    assert failed.trouble is not None
    assert (failed.trouble.reason, failed.trouble.message) == ("DeadlineExceeded", "too late")
    assert (failed.component, failed.round, failed.attempt, failed.uid) == ("rollout", 2, "abcd1234", "j")


@pytest.mark.parametrize("said", ["x", "-1", "1.5", "", "\u00b2"])
def test_a_round_that_is_no_number_is_none(said: str) -> None:
    odd = job()
    odd["metadata"]["labels"] = LABELS | {ROUND: said}
    assert (child(odd).round, child(job()).round) == (0, 2)


def test_a_failed_job_speaks_with_the_words_of_the_stage_that_a_retry_would_not_mend() -> None:
    failed = job(conditions=[{"type": "Failed", "status": "True", "reason": "PodFailurePolicy"}])
    told_to_end = pod("b", "Failed", containers=[ended(75, '{"reason": "Terminated", "message": "asked to"}', at="2026-01-01T00:00:05Z")])
    seen = child(failed, [pod("a", "Failed", containers=[ended(3, STAGE_SAID)]), told_to_end])
    assert seen.trouble is not None
    assert (seen.trouble.reason, seen.trouble.message) == ("LabelCoverageTooLow", "raise labels.attempts")


def test_a_stage_that_could_only_log_its_reason_is_heard_too() -> None:
    log = 'Traceback ...\n{"event": "stage failed", "level": "error", "reason": "Unexpected", "message": "KeyError: x"}\n'
    seen = child(job(conditions=[{"type": "Failed", "status": "True"}]), [pod("a", "Failed", containers=[ended(1, log)])])
    assert seen.trouble is not None
    assert (seen.trouble.reason, seen.trouble.message) == ("Unexpected", "KeyError: x")


def test_a_container_without_words_is_described_by_how_it_ended() -> None:
    seen = child(job(conditions=[{"type": "Failed", "status": "True"}]), [pod("a", "Failed", containers=[ended(137, reason="OOMKilled")])])
    assert seen.trouble is not None
    assert seen.trouble.reason == "OOMKilled"
    assert "exit code 137" in seen.trouble.message


def test_between_two_tries_a_job_says_why_the_last_one_failed() -> None:
    away = json.dumps({"reason": "StorageUnavailable", "message": "connection refused"})
    seen = child(job(active=0), [pod("a", "Failed", containers=[ended(75, away)])])
    assert seen.state is ChildState.WAITING
    assert seen.trouble is not None
    assert (seen.trouble.reason, seen.pods) == ("StorageUnavailable", 0)


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: no GPU"}]},
            "Unschedulable",
            "0/3 nodes: no GPU",
        ),
        ({"containers": [waiting("ImagePullBackOff", "Back-off pulling image x")]}, "ImagePullBackOff", "pulling image x"),
        ({"containers": [waiting("CreateContainerConfigError", 'secret "keys" not found')]}, "CreateContainerConfigError", "keys"),
        (
            {"containers": [waiting("CrashLoopBackOff", "back-off 10s", lastState=ended(1, STAGE_SAID)["state"])]},
            "CrashLoopBackOff",
            "raise labels.attempts",
        ),
    ],
)
def test_a_pod_that_waits_says_why(status: Json, reason: str, message: str) -> None:
    seen = child(job(active=1), [pod("demo-x", "Pending", **status)])
    assert seen.state is ChildState.WAITING
    assert seen.trouble is not None
    assert seen.trouble.reason == reason
    assert message in seen.trouble.message
    assert "demo-x" in seen.trouble.message


@pytest.mark.parametrize(
    ("component", "container", "reason", "message", "field", "remedy"),
    [
        ("rollout", "stage", "ErrImagePull", "reg/worker:9", "spec.image or the chart's runs.workerImage", "spec.rollouts.pod.image"),
        ("training", "stage", "ImagePullBackOff", "pulling image", "the chart's runs.trainerImage", "spec.training.pod.imagePullSecrets"),
        ("teacher", "vllm", "InvalidImageName", "A B", "spec.teacher.serving.image", "name an image that the nodes can pull"),
        ("student", "weights", "ErrImagePull", "not found", "spec.image", "spec.student.serving.pod.imagePullSecrets"),
        (
            "rollout",
            "stage",
            "CreateContainerConfigError",
            'secret "k" not found',
            "spec.teacher.endpoint",
            "create it in the run's namespace",
        ),
        ("prepare", "stage", "CreateContainerConfigError", 'secret "k" not found', "spec.storage.secretRef", "create it"),
        ("training", "stage", "CreateContainerConfigError", 'secret "k" not found', "spec.training.pod.envFrom", "create it"),
        ("student", "vllm", "CreateContainerConfigError", 'secret "k" not found', "spec.student.serving.env", "create it"),
    ],
)
def test_what_a_pod_does_not_get_is_said_with_its_field_and_the_remedy(
    component: str, container: str, reason: str, message: str, field: str, remedy: str
) -> None:
    own = {**waiting(reason, message), "name": container}
    seen = child(job(active=1), [pod("demo-x", "Pending", labels={**LABELS, COMPONENT: component}, containers=[own])])
    assert seen.trouble is not None
    assert all(part in seen.trouble.message for part in (message, field, remedy))


@pytest.mark.parametrize(
    ("component", "field"),
    [("training", "spec.training.gpusPerNode"), ("student", "spec.student.serving.gpus"), ("rollout", "nodeSelector")],
)
def test_what_no_node_has_is_said_with_the_fields_that_ask_for_it(component: str, field: str) -> None:
    nowhere = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
    seen = child(job(active=1), [pod(phase="Pending", labels={**LABELS, COMPONENT: component}, conditions=[nowhere])])
    assert seen.trouble is not None
    assert seen.trouble.message.startswith("pod p: 0/3 nodes are available: ask for what some node has to give")
    assert field in seen.trouble.message


def test_however_much_a_kubelet_says_the_remedy_is_still_said() -> None:
    seen = child(job(active=1), [pod("x" * 63, "Pending", containers=[waiting("ErrImagePull", "x" * 5000)])])
    assert seen.trouble is not None
    assert len(seen.trouble.message) < 900
    assert seen.trouble.message.endswith("imagePullSecrets")


def test_a_container_that_is_being_created_is_no_trouble() -> None:
    assert child(job(active=1), [pod(phase="Pending", containers=[waiting("ContainerCreating")])]).trouble is None


READY = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1}


def test_a_deployment_is_ready_when_all_replicas_of_this_generation_are() -> None:
    assert child(deployment(**READY)).state is ChildState.READY
    assert child(deployment(generation=2, **READY)).state is ChildState.RUNNING
    assert child(deployment(wanted=2, **READY)).state is ChildState.RUNNING
    assert child(deployment(**READY | {"replicas": 2})).state is ChildState.RUNNING
    scaled_down = child(deployment(wanted=0, **READY))
    assert (scaled_down.state, scaled_down.pods) == (ChildState.SUSPENDED, 1), "it still holds what the last pod holds"


def server_pod(**container: Any) -> Json:
    return pod("s", labels=LABELS | {COMPONENT: "student"}, containers=[{"name": "vllm", **container}])


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


def test_pods_belong_to_their_object_by_labels_and_orphans_are_seen() -> None:
    other_round = pod("of-round-1", labels=LABELS | {ROUND: "1"})
    gone = pod("ended-orphan", "Succeeded", labels=LABELS | {ROUND: "1"})
    seen = children([job(), deployment()], [pod("mine"), other_round, gone, server_pod()])
    assert [(one.kind, one.name, one.pods) for one in seen] == [
        ("Deployment", "demo-student", 1),
        ("Job", "demo-r002-rollout-abcd1234", 1),
        ("Pod", "of-round-1", 1),
    ]


def test_what_the_api_server_says_about_a_child_without_pods_is_why_it_waits() -> None:
    quota = Trouble("QuotaExceeded", "exceeded quota: gpus", datetime(2026, 1, 1, tzinfo=UTC))
    warnings = {("Job", "demo-r002-rollout-abcd1234"): quota, ("Deployment", "demo-student"): quota}
    server, worker = children([job(), deployment()], [], warnings)
    for one, field in ((worker, "spec.rollouts.workers"), (server, "spec.student.serving.replicas")):
        assert one.trouble is not None
        assert (one.state, one.trouble.reason, one.waiting_since) == (ChildState.WAITING, "QuotaExceeded", quota.since)
        assert one.trouble.message.startswith(f"exceeded quota: gpus: have the quota raised, or ask for less: {field}")
    pulling = pod("demo-x", "Pending", containers=[waiting("ImagePullBackOff")])
    (better,) = children([job()], [pulling], warnings)
    assert better.trouble is not None
    assert better.trouble.reason == "ImagePullBackOff"
    (ended,) = children([job(conditions=[{"type": "Complete", "status": "True"}])], [], warnings)
    assert (ended.state, ended.trouble) == (ChildState.SUCCEEDED, None)


def test_one_pod_that_is_refused_holds_up_a_training_and_not_the_other_workers() -> None:
    quota = Trouble("QuotaExceeded", "exceeded quota: gpus", datetime(2026, 1, 1, 1, tzinfo=UTC))
    warnings = {("Job", "demo-r002-rollout-abcd1234"): quota}
    manifest, rank = of("training", job(), pod())
    (training,) = children([manifest], [rank], warnings)
    assert training.trouble is not None
    assert (training.state, training.trouble.reason, training.waiting_since) == (ChildState.WAITING, "QuotaExceeded", quota.since)
    (workers,) = children([job()], [pod()], warnings)
    assert (workers.state, workers.waiting_since) == (ChildState.RUNNING, None)


def test_why_a_replacement_is_refused_is_said_before_how_the_last_pod_ended() -> None:
    quota = Trouble("QuotaExceeded", "exceeded quota: gpus", datetime(2026, 1, 1, 1, tzinfo=UTC))
    evicted = pod("a", "Failed", containers=[ended(137, "evicted")])
    (seen,) = children([job()], [evicted], {("Job", "demo-r002-rollout-abcd1234"): quota})
    assert seen.trouble is not None
    assert (seen.state, seen.trouble.reason, seen.waiting_since) == (ChildState.WAITING, "QuotaExceeded", quota.since)


def test_what_waits_to_run_says_since_when_unless_it_is_in_a_queue() -> None:
    made = datetime(2026, 1, 1, tzinfo=UTC)
    assert child(job(), [pod(phase="Pending")]).waiting_since == made
    initialising = pod(phase="Pending", initContainerStatuses=[{"name": "weights", "state": {"running": {}}}])
    assert child(deployment(), [initialising]).waiting_since is None, "its weights are on their way"
    gated = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}
    assert child(job(), [pod(phase="Pending", conditions=[gated])]).waiting_since is None
    assert child(job(startTime="2025-01-01T00:00:00Z"), []).waiting_since is None, "it ran for a year, and its pod was just deleted"
    assert child(job(spec={"suspend": True}), [pod(phase="Pending")]).waiting_since is None


def test_workers_do_not_wait_for_each_other_and_ranks_do() -> None:
    pods = [pod("a"), pod("b", "Pending")]
    assert child(job(), pods).waiting_since is None
    training = job()
    training["metadata"] |= {"labels": LABELS | {COMPONENT: "training"}}
    for one in pods:
        one["metadata"]["labels"] = LABELS | {COMPONENT: "training"}
    assert child(training, pods).waiting_since == datetime(2026, 1, 1, tzinfo=UTC)


def of(component: str, *objects: Json) -> list[Json]:
    """The same objects as another component's."""
    return [{**one, "metadata": {**one["metadata"], "labels": LABELS | {COMPONENT: component}}} for one in objects]


def going(name: str, due: str, phase: str = "Running") -> Json:
    one = pod(name, phase)
    return {**one, "metadata": {**one["metadata"], "deletionTimestamp": due}, "spec": {"nodeName": "gpu-7"}}


def test_a_pod_whose_node_does_not_say_that_it_ended_is_waited_for_and_named() -> None:
    overdue, due = going("a", ago(minutes=5)), NOW - timedelta(minutes=5)
    seen = child(job(active=0, terminating=1), [overdue])
    assert seen.trouble is not None
    assert (seen.state, seen.trouble.reason, seen.waiting_since, seen.pods) == (ChildState.WAITING, "NodeLost", due, 1)
    assert all(part in seen.trouble.message for part in ("pod a ", "node gpu-7 ", "delete node", "out-of-service", "--force"))
    training, *ranks = of("training", job(), overdue, pod("b"))
    gang = child(training, ranks)
    assert (gang.state, gang.waiting_since) == (ChildState.WAITING, due), "its peers wait for it"
    workers = child(job(), [overdue, pod("b")])
    assert (workers.state, workers.waiting_since) == (ChildState.RUNNING, None), "the others work"


def test_a_pod_that_ends_in_its_time_or_has_ended_is_no_lost_one() -> None:
    for one in (going("a", ago(seconds=5)), going("a", ago(seconds=-120)), going("a", ago(hours=1), "Failed")):
        trouble = child(job(), [one, pod("b")]).trouble
        assert trouble is None


def test_a_server_waits_for_a_lost_node_where_nothing_takes_its_place() -> None:
    manifest, overdue = of("student", deployment(), going("s", ago(minutes=5)))
    assert child(manifest, [overdue]).trouble is None, "its Deployment makes another pod at once"
    group = child(manifest | {"kind": "LeaderWorkerSet"}, [overdue])
    assert group.trouble is not None
    assert (group.state, group.trouble.reason) == (ChildState.WAITING, "NodeLost")


@pytest.mark.parametrize("kind", ["Deployment", "LeaderWorkerSet"])
def test_an_edited_server_waits_for_the_node_that_keeps_a_pod_of_the_earlier_attempt_and_says_since_when(kind: str) -> None:
    old = going("s-old", ago(minutes=5))
    old["metadata"]["labels"] = LABELS | {COMPONENT: "student", ATTEMPT: "00000000"}
    seen = child(deployment() | {"kind": kind}, [old])
    assert seen.trouble is not None
    assert (seen.state, seen.trouble.reason, seen.waiting_since) == (ChildState.WAITING, "NodeLost", NOW - timedelta(minutes=5))
    assert "node gpu-7" in seen.trouble.message
    old["metadata"]["deletionTimestamp"] = ago(seconds=5)
    assert child(deployment() | {"kind": kind}, [old]).trouble is None, "it ends in its time"


def test_a_lost_pod_is_known_also_of_what_waits_for_nothing_itself() -> None:
    server, overdue = of("student", deployment(wanted=0), going("s", ago(minutes=5)))
    given_up, _ = of("student", deployment(annotations={FAILED: "broken"}), overdue)
    deleting = job()
    deleting["metadata"] = {**deleting["metadata"], "deletionTimestamp": ago(minutes=6)}
    failed = job(conditions=[{"type": "Failed", "status": "True"}])
    at_rest = [child(server, [overdue]), child(given_up, [overdue])]
    at_rest += [child(one, [going("a", ago(minutes=5))]) for one in (job(spec={"suspend": True}), failed, deleting)]
    for one in at_rest:
        assert one.lost is not None
        assert (one.lost.reason, one.lost.since) == ("NodeLost", NOW - timedelta(minutes=5)), one
    assert child(server, [going("s", ago(seconds=5))]).lost is None, "it ends in its time"


def test_a_job_tells_how_each_of_its_pods_failed() -> None:
    away = json.dumps({"reason": "StorageUnavailable", "message": "connection refused"})
    drained = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
    pods = [
        pod("b", "Failed", containers=[ended(137, reason="OOMKilled", at="2026-01-01T00:00:09Z")], conditions=[drained]),
        pod("a", "Failed", containers=[ended(75, away, at="2026-01-01T00:00:05Z")], labels={**LABELS, COMPLETION_INDEX: "2"}),
        pod("c", "Failed", reason="Evicted", message="low on disk"),
        pod("d"),
        pod("e", "Succeeded", containers=[ended(0)]),
    ]
    seen = child(job(), pods).failures
    assert {(one.reason, one.exit_code, one.disrupted) for one in seen} == {
        ("StorageUnavailable", 75, False),
        ("OOMKilled", 137, True),
        ("Evicted", None, False),
    }
    assert [one.reason for one in seen if one.exit_code] == ["StorageUnavailable", "OOMKilled"], "oldest first"
    assert [one.index for one in seen if one.exit_code == 75] == ["2"]


def test_a_job_that_the_plan_gave_up_has_failed_whatever_its_pods_do() -> None:
    given_up = job(spec={"suspend": True})
    given_up["metadata"] = {**given_up["metadata"], "annotations": {FAILED: STAGE_SAID}}
    seen = child(given_up, [pod()])
    assert (seen.state, seen.pods, seen.holds) == (ChildState.FAILED, 1, True)
    assert seen.trouble is not None
    assert seen.trouble.reason == "LabelCoverageTooLow"


def test_a_pod_of_another_job_is_not_taken_for_one_of_this_by_its_labels() -> None:
    stranger = pod("by-hand", "Failed", containers=[ended(3, STAGE_SAID)])
    stranger["metadata"]["ownerReferences"] = [{"kind": "Job", "uid": "another"}]
    own = pod("own")
    own["metadata"]["ownerReferences"] = [{"kind": "Job", "uid": "j"}]
    (seen,) = children([job()], [stranger, own])
    assert (seen.pods, seen.failures) == (1, ())


def test_a_group_of_nodes_is_observed_as_a_server_is() -> None:
    group = deployment(**{name: count for name, count in READY.items() if name != "observedGeneration"})
    group |= {"kind": "LeaderWorkerSet"}
    assert child(group).state is ChildState.READY
    assert child(group | {"spec": {"replicas": 0}}).state is ChildState.SUSPENDED
