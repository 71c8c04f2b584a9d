"""What only a cluster can use is in the objects: scheduling, claims, identities, several nodes, a queue."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from dagger_operator.api import DAggerRun, PodSettings, Role
from dagger_operator.control import Results, StageName, Step, steps
from dagger_operator.control.identity import WORKER_ROLE, build_identity
from dagger_operator.control.jobs import build_job
from dagger_operator.control.servers import build_server, build_service, served
from dagger_operator.store.results import PrepareResult

Json = dict[str, Any]
Make = Callable[..., DAggerRun]
RESULTS = Results({(0, "prepare"): PrepareResult(policy="r000-base", teacher="teacher-1")})
POD: Json = {
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "low",
    "imagePullSecrets": [{"name": "registry"}],
    "resources": {"requests": {"cpu": "8"}, "limits": {"memory": "1Gi"}},
    "labels": {"team": "a"},
    "annotations": {"example.org/note": "b"},
    "sharedMemoryMib": 1024,
    "claims": [{"claimName": "weights", "mountPath": "/models"}],
}


def environment(manifest: Json, container: str = "stage") -> Json:
    (found,) = [one for one in manifest["spec"]["template"]["spec"]["containers"] if one["name"] == container]
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in found["env"]}


def test_what_a_user_says_about_pods_is_in_them_and_what_runs_inside_does_not_see_it(make_run: Make) -> None:
    run = make_run(rollouts={"workers": 3, "pod": POD})
    plain, job = build_job(make_run(), Step(1, StageName.ROLLOUT), RESULTS), build_job(run, Step(1, StageName.ROLLOUT), RESULTS)
    template = job["spec"]["template"]
    spec, (stage,) = template["spec"], template["spec"]["containers"]
    assert {key: spec[key] for key in ("nodeSelector", "tolerations", "priorityClassName", "imagePullSecrets")} == {
        key: POD[key] for key in ("nodeSelector", "tolerations", "priorityClassName", "imagePullSecrets")
    }
    assert stage["resources"] == {"requests": {"cpu": "8"}, "limits": {"memory": "1Gi"}}, "a request must not exceed its limit"
    assert {"name": "claim-0", "mountPath": "/models", "readOnly": True} in stage["volumeMounts"]
    assert template["metadata"]["labels"]["team"] == "a"
    assert template["metadata"]["annotations"] == {"example.org/note": "b"}
    assert environment(job)["DAGGER_RUN"] == environment(plain)["DAGGER_RUN"]
    assert job["metadata"]["name"] != plain["metadata"]["name"]


ENVIRONMENT: Json = {"env": [{"name": "HF_ENDPOINT", "value": "https://mirror"}], "envFrom": [{"secretRef": {"name": "hub"}}]}


def told(manifest: Json) -> set[str]:
    """Names of the containers that see the variable and the Secret of `ENVIRONMENT`; no other sees a part of it."""
    spec = manifest["spec"]["template"]["spec"]
    containers = [*spec.get("initContainers", ()), *spec["containers"]]
    env = {one["name"] for one in containers if {"name": "HF_ENDPOINT", "value": "https://mirror"} in one["env"]}
    secrets = {one["name"] for one in containers if {"secretRef": {"name": "hub"}} in one.get("envFrom", ())}
    assert env == secrets
    return env


def test_the_environment_of_pods_reaches_what_runs_this_projects_commands_and_not_vllm(make_run: Make) -> None:
    run = make_run(rollouts={"pod": ENVIRONMENT}, storage={"url": "s3://bucket/prefix", "secretRef": {"name": "storage-keys"}})
    assert {step.stage for step in steps(run.spec) if told(build_job(run, step, RESULTS))} == set(StageName) - {StageName.TRAINING}
    prepare = build_job(run, Step(0, StageName.PREPARE), RESULTS)
    (stage,) = prepare["spec"]["template"]["spec"]["containers"]
    assert stage["envFrom"][-1] == {"secretRef": {"name": "storage-keys"}}, "the last one wins: storage is read as the operator reads it"
    trained = build_job(make_run(training={"pod": ENVIRONMENT}), Step(1, StageName.TRAINING), RESULTS)
    assert told(trained) == {"stage"}
    assert trained["metadata"]["name"] != build_job(make_run(), Step(1, StageName.TRAINING), RESULTS)["metadata"]["name"]
    run = make_run(student={"model": "m", "serving": {"pod": ENVIRONMENT, "env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}})
    assert run.spec.student.served is not None
    server = build_server(run, Role.STUDENT, run.spec.student.served, replicas=1)
    assert told(server) == {"weights", "agent"}
    assert environment(server, "vllm")["NCCL_DEBUG"] == "INFO" and "NCCL_DEBUG" not in environment(server, "agent")


def test_weights_on_a_claim_are_mounted_where_they_are_prepared_and_served(make_run: Make) -> None:
    student = {"model": "/models/x", "serving": {"gpus": 1, "pod": {"claims": POD["claims"]}}}
    run = make_run(student=student)
    mounting = {step.stage for step in steps(run.spec) if "persistentVolumeClaim" in json.dumps(build_job(run, step, RESULTS))}
    assert mounting == {StageName.PREPARE}
    serving = served(run, Role.STUDENT)
    assert serving is not None
    server = build_server(run, Role.STUDENT, serving, replicas=1)["spec"]["template"]["spec"]
    assert all("/models" in {mount["mountPath"] for mount in one["volumeMounts"]} for one in server["initContainers"])


def test_workers_make_sandbox_pods_in_their_own_name_and_only_there(make_run: Make) -> None:
    run = make_run(sandbox={"namespace": "sandboxes", "helperImage": "helper:1"})
    with_identity = {
        step.stage for step in steps(run.spec) if "serviceAccountName" in build_job(run, step, RESULTS)["spec"]["template"]["spec"]
    }
    assert with_identity == {StageName.ROLLOUT, StageName.EVALUATION}
    env = environment(build_job(run, Step(1, StageName.ROLLOUT), RESULTS))
    assert (env["DAGGER_SANDBOX_NAMESPACE"], env["DAGGER_HELPER_IMAGE"]) == ("sandboxes", "helper:1")
    assert env["DAGGER_RUN_NAMESPACE"] == {"fieldRef": {"fieldPath": "metadata.namespace"}}
    account, binding = build_identity(run, "sandboxes")
    assert (account["kind"], account["metadata"]["name"]) == ("ServiceAccount", "demo-worker")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "demo-worker", "namespace": "lab"}]


def test_a_named_accounts_token_is_where_its_description_says(make_run: Make) -> None:
    run = make_run(sandbox={"namespace": "sandboxes"}, rollouts={"pod": {"serviceAccountName": "cloud"}})
    (binding,) = build_identity(run, "sandboxes")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "cloud", "namespace": "lab"}]
    pods = {step.stage: build_job(run, step, RESULTS)["spec"]["template"]["spec"] for step in steps(run.spec)}
    assert {stage for stage, pod in pods.items() if pod.get("serviceAccountName") == "cloud"} == set(pods) - {StageName.TRAINING}
    mounted = {stage for stage, pod in pods.items() if pod["automountServiceAccountToken"]}
    assert mounted == {StageName.ROLLOUT, StageName.EVALUATION}
    described = PodSettings.model_fields["service_account_name"].description or ""
    assert all(stage.value in described for stage in mounted) and WORKER_ROLE in described


def test_a_teacher_over_several_nodes_is_one_engine_that_the_first_node_answers_for(make_run: Make) -> None:
    run = make_run(teacher={"model": "t", "serving": {"gpus": 8, "nodes": 2, "replicas": 3}})
    serving = run.spec.teacher.serving
    assert serving is not None
    group = build_server(run, Role.TEACHER, serving, replicas=3)
    template = group["spec"]["leaderWorkerTemplate"]
    assert (group["kind"], group["spec"]["replicas"], template["size"]) == ("LeaderWorkerSet", 3, 2)
    leader, follower = template["leaderTemplate"]["spec"], template["workerTemplate"]["spec"]
    assert [one["name"] for one in leader["containers"]] == ["vllm", "agent"]
    (vllm,) = follower["containers"]
    assert "--headless" in vllm["command"]
    for command in (leader["containers"][0]["command"], vllm["command"]):
        given = dict(pairwise(command))
        assert (given["--tensor-parallel-size"], given["--pipeline-parallel-size"], given["--nnodes"]) == ("8", "2", "2")
        assert (given["--node-rank"], given["--master-addr"]) == ("$(LWS_WORKER_INDEX)", "$(LWS_LEADER_ADDRESS)")
    selector = build_service(run, Role.TEACHER, serving)["spec"]["selector"]
    assert selector["leaderworkerset.sigs.k8s.io/worker-index"] == "0"


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_server_that_is_ended_has_time_for_the_turns_under_way_and_hands_out_none_that_it_cuts_off(make_run: Make, gpus: int) -> None:
    run = make_run(student={"model": "m", "serving": {"gpus": gpus}})
    assert run.spec.student.served is not None
    pod = build_server(run, Role.STUDENT, run.spec.student.served, replicas=1)["spec"]["template"]["spec"]
    given = dict(pairwise(pod["containers"][0]["command"]))
    assert 0 < int(given["--shutdown-timeout"]) < pod.get("terminationGracePeriodSeconds", 30)


def test_in_a_queue_nothing_is_suspended_by_the_plan(make_run: Make) -> None:
    run = make_run(kueue={"queueName": "gpus", "priorityClass": "low"})
    job = build_job(run, Step(1, StageName.TRAINING), RESULTS, suspend=True)
    assert "suspend" not in job["spec"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert "kueue" not in json.dumps(job["spec"]["template"]["metadata"])
    assert job["metadata"]["name"] != build_job(make_run(), Step(1, StageName.TRAINING), RESULTS)["metadata"]["name"]
