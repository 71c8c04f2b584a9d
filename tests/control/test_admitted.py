"""A real API server takes every object that a plan may ask for, and its pods in a namespace that enforces the restricted standard."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dagger_operator.api import DAggerRun, Role
from dagger_operator.control import Results, Trouble, steps
from dagger_operator.control.identity import build_identity
from dagger_operator.control.jobs import build_job, build_training_service
from dagger_operator.control.network import build_network_policy, build_training_policy
from dagger_operator.control.servers import build_server, build_service, served
from dagger_operator.store.results import PrepareResult

pytestmark = pytest.mark.heavy

Json = dict[str, Any]
RESULTS = Results({(0, "prepare"): PrepareResult(policy="r000-base", teacher="teacher-1")})
POD: Json = {
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}],
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": []}]}}},
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    "imagePullSecrets": [{"name": "registry"}],
    "schedulerName": "other",
    "resources": {"requests": {"cpu": "8", "memory": "512Mi"}, "limits": {"memory": "1Gi", "cpu": "8"}},
    "labels": {"team": "a"},
    "annotations": {"example.org/note": "b"},
    "sharedMemoryMib": 1024,
    "claims": [{"claimName": "weights", "mountPath": "/models"}],
}
RULES = [
    {"stages": ["Training"], "exitCodes": [137, 9], "action": "RetryWithoutCounting"},
    {"exitCodes": [3], "action": "Retry"},
    {"reasons": ["OOMKilled"], "action": "FailRun"},
]


def manifests(run: DAggerRun) -> Iterator[Json]:
    yield from build_identity(run, run.metadata.namespace)
    for step in steps(run.spec):
        yield build_job(run, step, RESULTS)
        yield build_job(run, step, RESULTS, suspend=True, given_up=Trouble("Broken", "mend it"))
    for role in Role:
        if (serving := served(run, role)) is not None:
            yield build_server(run, role, serving, replicas=serving.replicas)
            yield build_service(run, role, serving)
    yield build_training_service(run)
    yield build_network_policy(run)
    yield build_training_policy(run)


def templates(manifest: Json) -> Iterator[Json]:
    spec = manifest.get("spec", {})
    group = spec.get("leaderWorkerTemplate", {})
    yield from (one for one in (spec.get("template"), group.get("leaderTemplate"), group.get("workerTemplate")) if one)


@pytest.mark.parametrize("nodes", [1, 2])
def test_every_object_is_admitted(make_run: Callable[..., DAggerRun], control_plane: Any, namespace: str, nodes: int) -> None:
    run = make_run(
        student={"model": "m", "serving": {"gpus": 1, "pod": POD}},
        teacher={"model": "t", "serving": {"gpus": 8, "nodes": nodes, "pod": POD}},
        training={"nodes": 2, "pod": POD},
        rollouts={"workers": 3, "pod": POD},
        sandbox={"namespace": namespace, "helperImage": "helper:1", "pod": {"runtimeClassName": "gvisor", "hostUsers": False}},
        failurePolicy={"rules": RULES[: nodes + 1]},
        kueue={"queueName": "gpus", "priorityClass": "low"} if nodes == 2 else None,
        preRunningDeadlineSeconds=600,
    )
    run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"namespace": namespace})})
    control_plane.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    document = {
        "apiVersion": run.api_version,
        "kind": run.kind,
        "metadata": {"name": "demo", "namespace": namespace},
        "spec": run.spec.wire(),
    }
    control_plane.kubectl("apply", "-f", "-", input=json.dumps(document))
    stored = json.loads(control_plane.kubectl("get", "daggerrun", "demo", f"--namespace={namespace}", "-o", "json"))
    assert stored["spec"] == run.spec.wire(), "nothing is pruned, and there is nothing to fill in"
    account, *_ = build_identity(run, namespace)
    made = [one for one in manifests(run) if one["kind"] != "LeaderWorkerSet"]
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            **template,
            "metadata": {**template["metadata"], "name": f"pod-{index}", "namespace": namespace},
        }
        for index, template in enumerate(template for one in manifests(run) for template in templates(one))
    ]
    del account["metadata"]["ownerReferences"]  # of a run with another uid: the garbage collector would take it away
    control_plane.kubectl("apply", "--server-side", "-f", "-", input=json.dumps(account))
    everything = {"apiVersion": "v1", "kind": "List", "items": [*made, *pods]}
    said = control_plane.kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", input=json.dumps(everything))
    assert len(said.splitlines()) == len(made) + len(pods)


def test_a_job_at_work_can_be_suspended_resumed_and_given_up(
    make_run: Callable[..., DAggerRun], control_plane: Any, namespace: str
) -> None:
    """The fields that the plan changes of a Job are ones that may change."""
    run = make_run()
    run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"namespace": namespace})})
    (step, *_) = steps(run.spec)
    forms = [
        build_job(run, step, RESULTS),
        build_job(run, step, RESULTS, suspend=True),
        build_job(run, step, RESULTS),
        build_job(run, step, RESULTS, given_up=Trouble("Broken", "mend it")),
    ]
    for form in forms:
        del form["metadata"]["ownerReferences"]  # nobody of that uid exists: it would be collected
        control_plane.kubectl("apply", "--server-side", "--field-manager=dagger-operator", "-f", "-", input=json.dumps(form))
