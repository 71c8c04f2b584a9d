"""Children mirror what their pods say, so that a condition can say why a run waits."""

import json
from datetime import UTC, datetime

import pytest

from control.observed import LABELS, NOW, STAGE_SAID, Json, child, children, deployment, ended, job, of, pod, server_pod, waiting
from dagger_operator.control import COMPONENT, FAILED, ROUND, ChildState, Trouble
from dagger_operator.control.names import COMPLETION_INDEX


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


def test_a_pod_that_ends_because_it_is_deleted_costs_nothing_also_while_it_is_still_there() -> None:
    words = json.dumps({"reason": "Terminated", "message": "asked to end"})
    failed = pod("a", "Failed", containers=[ended(75, words)])
    assert [failure.reason for failure in child(job(active=1), [failed]).failures] == ["Terminated"]
    failed["metadata"]["deletionTimestamp"] = NOW.isoformat()
    assert child(job(active=1), [failed]).failures == ()


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
