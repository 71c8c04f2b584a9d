"""What the chart's admission policies refuse and what they let through, on a real API server."""

import copy
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.interface import SandboxRequest
from dagger_operator.sandbox.pod_manifest import Setting, pod

pytestmark = pytest.mark.heavy

Json = dict[str, Any]


@pytest.fixture(scope="module")
def workers(release: Any) -> dict[str, str]:
    """Workers of runs in two namespaces, bound as the operator binds them."""
    for name, namespace in ("mine", release.runs), ("other", "default"):
        bind = ["create", "rolebinding", f"{namespace}.{name}.worker", "--role=dagger-sandbox-worker"]
        release.kubectl(*bind, f"--serviceaccount={namespace}:{name}-worker", f"--namespace={release.sandboxes}")
    return {"mine": f"system:serviceaccount:{release.runs}:mine-worker", "other": "system:serviceaccount:default:other-worker"}


def sandbox(release: Any, run: str = "mine") -> Json:
    """The pod that a run's worker makes."""
    setting = Setting(
        run, release.runs if run == "mine" else "default", "rollout-0", "1a2b3c4d", "dagger-operator/worker:0.1.0", SandboxLimits(), 3600
    )
    lease = {"metadata": {"name": f"{run}-rollout-0-1a2b3c4d", "uid": "d3b3f1c8-0000-4000-8000-000000000000"}}
    made = pod(setting, SandboxRequest("one", image="docker.io/library/debian:bookworm"), digest="0" * 64, owner=lease)
    made["metadata"]["namespace"] = release.sandboxes
    return made


def lease(release: Any, run: str) -> Json:
    labels = sandbox(release, run)["metadata"]["labels"]
    metadata = {"name": f"{run}-lease", "namespace": release.sandboxes, "labels": labels}
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": {"holderIdentity": run}}


def test_a_sandbox_as_the_worker_makes_it_is_let_through(release: Any, workers: dict[str, str]) -> None:
    made = release.create(sandbox(release), user=workers["mine"])
    assert made.returncode == 0, made.stderr


def edit(path: str, value: Any) -> Callable[[Json], None]:
    """Sets a field of the pod, or takes it away where the value is None."""

    def apply(manifest: Json) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        node: Any = manifest
        for part in parents:
            node = node[part]
        if value is None:
            del node[last]
        elif isinstance(node.get(last), list):
            node[last] = [*node[last], *value]
        else:
            node[last] = value

    return apply


MAIN = "spec.containers.0"
ROOTS = {"apiVersion": "v1", "kind": "ConfigMap", "name": "kube-root-ca.crt"}
ESCAPES = [
    (edit("spec.hostNetwork", True), "leave out hostNetwork, hostPID and hostIPC"),
    (edit("spec.hostPID", True), "leave out hostNetwork, hostPID and hostIPC"),
    (edit("spec.volumes", [{"name": "root", "hostPath": {"path": "/"}}]), "volumes of type emptyDir only"),
    (edit("spec.volumes", [{"name": "keys", "secret": {"secretName": "storage"}}]), "volumes of type emptyDir only"),
    (
        edit("spec.volumes", [{"name": "id", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]),
        "volumes of type emptyDir only",
    ),
    (edit(f"{MAIN}.envFrom", [{"secretRef": {"name": "storage"}}]), "reads no Secret or ConfigMap"),
    (edit(f"{MAIN}.env", [{"name": "K", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]), "reads no Secret or ConfigMap"),
    (edit("spec.automountServiceAccountToken", True), "set automountServiceAccountToken to false"),
    (edit("spec.automountServiceAccountToken", None), "set automountServiceAccountToken to false"),
    (edit("spec.serviceAccountName", "builder"), "leave out serviceAccountName"),
    (edit(f"{MAIN}.securityContext", {"privileged": True}), "are not privileged"),
    (edit(f"{MAIN}.securityContext.capabilities", {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}), "capabilities: {drop: [ALL]}"),
    (edit("spec.initContainers.0.securityContext", None), "allowPrivilegeEscalation: false"),
    (edit("spec.securityContext", {}), "seccompProfile.type RuntimeDefault"),
    (edit(f"{MAIN}.ports", [{"containerPort": 80, "hostPort": 80}]), "leave out hostPort"),
    (edit(f"{MAIN}.resources.limits.memory", None), "resources.limits of cpu, memory and ephemeral-storage"),
    (edit("spec.activeDeadlineSeconds", None), "set activeDeadlineSeconds"),
    (edit("spec.activeDeadlineSeconds", 30 * 365 * 86400), "set activeDeadlineSeconds, to 627600 at most"),
    (edit("metadata.ownerReferences", None), "owned by its worker's Lease"),
    (edit("metadata.ownerReferences.0.apiVersion", "example.com/v1"), "owned by its worker's Lease and by nothing else"),
    (edit("metadata.ownerReferences", [{**ROOTS, "uid": "d3b3f1c8-0000-4000-8000-000000000001"}]), "and by nothing else"),
]


@pytest.mark.parametrize("escape, says", ESCAPES, ids=[f"{number}-{says[:32]}" for number, (_, says) in enumerate(ESCAPES)])
def test_a_sandbox_that_is_not_confined_is_refused_with_the_remedy(
    release: Any, workers: dict[str, str], escape: Callable[[Json], None], says: str
) -> None:
    manifest = copy.deepcopy(sandbox(release))
    escape(manifest)
    if manifest["spec"].get("serviceAccountName"):
        release.kubectl("create", "serviceaccount", "builder", f"--namespace={release.sandboxes}")
    refused = release.create(manifest)
    assert refused.returncode, "let through"
    assert says in refused.stderr, refused.stderr


def test_a_worker_makes_and_removes_what_is_its_own_namespaces(release: Any, workers: dict[str, str]) -> None:
    assert release.create(lease(release, "mine"), user=workers["mine"], keep=True).returncode == 0
    for run, user in ("other", workers["mine"]), ("mine", workers["other"]):
        for manifest in sandbox(release, run), lease(release, run):
            refused = release.create(manifest, user=user)
            assert refused.returncode and "only what belongs to runs of its namespace" in refused.stderr
    unlabelled = lease(release, "mine")
    unlabelled["metadata"] |= {"name": "bare", "labels": {}}
    assert "only what belongs to runs of its namespace" in release.create(unlabelled, user=workers["mine"]).stderr

    mine = ["lease/mine-lease", f"--namespace={release.sandboxes}"]
    stolen = release.kubectl("delete", *mine, "--as", workers["other"])
    assert stolen.returncode and "only what belongs to runs of its namespace" in stolen.stderr
    relabelled = lease(release, "other")
    relabelled["metadata"]["name"] = "mine-lease"
    taken = release.kubectl("replace", "-f", "-", "--as", workers["other"], input=yaml.safe_dump(relabelled))
    assert taken.returncode and "only what belongs to runs of its namespace" in taken.stderr
    assert release.kubectl("delete", *mine, "--as", workers["mine"]).returncode == 0


@pytest.mark.parametrize("label", ["app.kubernetes.io/managed-by", "dagger-operator.dev/run"])
def test_what_a_worker_makes_can_be_found(release: Any, workers: dict[str, str], label: str) -> None:
    for made in sandbox(release), lease(release, "mine"):
        del made["metadata"]["labels"][label]
        refused = release.create(made, user=workers["mine"])
        assert refused.returncode and "find by its labels" in refused.stderr, refused.stderr


def test_a_workers_lease_goes_when_it_is_deleted(release: Any, workers: dict[str, str]) -> None:
    kept = lease(release, "mine")
    held = lease(release, "mine")
    held["metadata"]["finalizers"] = ["example.com/stay"]
    assert "leave out finalizers" in release.create(held, user=workers["mine"]).stderr
    assert release.create(kept, user=workers["mine"], keep=True).returncode == 0
    refused = release.kubectl("replace", "-f", "-", "--as", workers["mine"], input=yaml.safe_dump(held))
    assert refused.returncode and "leave out finalizers" in refused.stderr, refused.stderr
    there = ["lease/mine-lease", f"--namespace={release.sandboxes}"]
    assert release.kubectl("delete", *there, "--as", workers["mine"]).returncode == 0


def test_labels_of_runs_are_for_controllers(release: Any) -> None:
    worn = {"name": "worn", "namespace": release.runs, "labels": {"app.kubernetes.io/managed-by": "dagger-operator"}}
    service: Json = {"apiVersion": "v1", "kind": "Service", "metadata": worn, "spec": {"ports": [{"port": 80}]}}
    refused = release.create(service)
    assert refused.returncode and "leave that label out" in refused.stderr
    by_the_operator = release.create(service, user=release.operator)
    assert by_the_operator.returncode == 0, by_the_operator.stderr
    service["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "me"}
    assert release.create(service).returncode == 0


WORN = {"app.kubernetes.io/managed-by": "dagger-operator", "dagger-operator.dev/run": "theirs"}


def workload(release: Any, kind: str, worn: Json, own: Json | None = None) -> Json:
    """An object that makes pods with the labels `worn`; `own`: its own."""
    pods = {"metadata": {"labels": {"app": "mine", **worn}}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
    ending = {**pods, "spec": {**pods["spec"], "restartPolicy": "Never"}}
    selected = {"selector": {"matchLabels": {"app": "mine"}}, "template": pods}
    api_version, spec = {
        "Deployment": ("apps/v1", selected),
        "ReplicaSet": ("apps/v1", selected),
        "StatefulSet": ("apps/v1", {**selected, "serviceName": "mine"}),
        "DaemonSet": ("apps/v1", selected),
        "ReplicationController": ("v1", {"selector": {"app": "mine"}, "template": pods}),
        "Job": ("batch/v1", {"template": ending}),
        "CronJob": ("batch/v1", {"schedule": "@daily", "jobTemplate": {"spec": {"template": ending}}}),
    }[kind]
    metadata = {"name": "worn", "namespace": release.runs, "labels": own or {"team": "agents"}}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec}


def applied(release: Any, manifest: Json, *, user: str | None = None) -> "subprocess.CompletedProcess[str]":
    """What a user is told who applies an object and has every right: the policies alone speak."""
    arguments = ["apply", "--server-side", "--force-conflicts", "-f", "-", *(["--as", user, "--as-group=system:masters"] if user else [])]
    return release.kubectl(*arguments, input=yaml.safe_dump(manifest))


WORKLOADS = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "ReplicationController", "Job", "CronJob")


@pytest.mark.parametrize("kind", WORKLOADS)
def test_no_pod_wears_a_runs_labels_because_a_person_wrote_them_into_a_template(release: Any, kind: str) -> None:
    refused = applied(release, workload(release, kind, WORN))
    assert refused.returncode and "leave that label out" in refused.stderr, refused.stderr
    # The operator makes Deployments and Jobs, and controllers make of its objects what is theirs to make.
    for user in release.operator, "system:serviceaccount:kube-system:some-controller", "system:serviceaccount:lws-system:lws":
        for made in workload(release, kind, WORN, WORN), workload(release, kind, WORN, {**WORN, "again": "yes"}):
            done = applied(release, made, user=user)
            assert done.returncode == 0, done.stderr
        assert release.kubectl("delete", kind.lower(), "worn", f"--namespace={release.runs}").returncode == 0
    assert release.create(workload(release, kind, {})).returncode == 0


def test_a_cron_jobs_jobs_wear_no_runs_labels_either(release: Any) -> None:
    made = workload(release, "CronJob", {})
    made["spec"]["jobTemplate"]["metadata"] = {"labels": WORN}
    assert "leave that label out" in release.create(made).stderr


def test_labels_of_runs_are_not_put_on_later(release: Any) -> None:
    there = f"--namespace={release.runs}"
    assert applied(release, workload(release, "Deployment", {})).returncode == 0
    put_on = release.kubectl("label", "deployment/worn", *(f"{key}={value}" for key, value in WORN.items()), there)
    assert put_on.returncode and "leave that label out" in put_on.stderr, put_on.stderr
    assert "leave that label out" in applied(release, workload(release, "Deployment", WORN)).stderr
    # Other edits, of one's own and of what the operator made, are everyone's who has the right.
    for user in None, release.operator:
        if user:
            assert applied(release, workload(release, "Deployment", WORN, WORN), user=user).returncode == 0
        edited = release.kubectl("label", "deployment/worn", "edited=yes", there)
        assert edited.returncode == 0, edited.stderr
        assert release.kubectl("delete", "deployment/worn", there).returncode == 0


def run(release: Any, **spec: Any) -> Json:
    source = {"type": "JSONL", "uri": "s3://bucket/tasks.jsonl"}
    whole = {
        "student": {"model": "Qwen/Qwen3-4B-Instruct-2507"},
        "teacher": {"model": "teacher", "endpoint": {"url": "https://teacher.example/v1"}},
        "tasks": {"source": source, "heldOut": {"source": {**source, "split": "heldout"}}},
        "storage": {"url": "s3://bucket/run"},
    }
    metadata = {"name": "asked", "namespace": release.runs}
    return {"apiVersion": "dagger-operator.dev/v1alpha1", "kind": "DAggerRun", "metadata": metadata, "spec": {**whole, **spec}}


def test_a_sandbox_namespace_that_is_not_prepared_is_refused(release: Any) -> None:
    assert release.create(run(release, sandbox={"namespace": release.sandboxes})).returncode == 0
    refused = release.create(run(release, sandbox={"namespace": "kube-system"}))
    assert refused.returncode and "write that, or leave it out" in refused.stderr and release.sandboxes in refused.stderr


def until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture
def older(release: Any) -> Iterator[tuple[str, str]]:
    """A run with another sandbox namespace than the chart's: it is older than the policy, or than the chart's present namespace."""
    made = run(release, sandbox={"namespace": "sandboxes-before"})
    made["metadata"]["name"] = "older"
    binding = ["patch", "validatingadmissionpolicybinding/dagger-operator-runs", "--type=merge", "--patch"]
    release.kubectl(*binding, '{"spec": {"validationActions": ["Warn"]}}')
    try:
        until("the run is let through", lambda: release.create(made, keep=True).returncode == 0)
    finally:
        release.kubectl(*binding, '{"spec": {"validationActions": ["Deny"]}}')
    made["metadata"]["name"] = "newer"
    until("the policy refuses again", lambda: release.create(made).returncode != 0)
    yield "daggerrun/older", f"--namespace={release.runs}"
    release.kubectl("delete", "daggerrun/older", f"--namespace={release.runs}", "--ignore-not-found", "--wait=false")


def test_a_run_whose_sandbox_namespace_is_no_longer_the_clusters_can_be_edited_and_not_moved(release: Any, older: tuple[str, str]) -> None:
    for edited in (
        release.kubectl("patch", *older, "--type=merge", "--patch", '{"spec": {"suspend": true}}'),
        release.kubectl("annotate", *older, "dagger-operator.dev/retry=1"),
    ):
        assert edited.returncode == 0, edited.stderr
    moved = release.kubectl("patch", *older, "--type=merge", "--patch", '{"spec": {"sandbox": {"namespace": "kube-system"}}}')
    assert moved.returncode and "write that, or leave it out" in moved.stderr
    right = json.dumps({"spec": {"sandbox": {"namespace": release.sandboxes}}})
    moved = release.kubectl("patch", *older, "--type=merge", "--patch", right)
    assert moved.returncode == 0, moved.stderr


def test_such_a_run_goes_when_it_is_deleted_after_its_children(release: Any, older: tuple[str, str]) -> None:
    """The garbage collector removes the finalizer by which such a deletion waits."""
    deleted = release.kubectl("delete", *older, "--cascade=foreground", "--timeout=90s")
    assert deleted.returncode == 0, deleted.stderr
    assert "NotFound" in release.kubectl("get", *older).stderr


LOCAL = [
    ({"storage": {"url": "file:///data"}}, "every pod has folders of its own"),
    ({"storage": {"url": "s3://b/p", "endpointUrl": "http://127.0.0.1:7070"}}, "spec.storage.endpointUrl is a loopback address"),
    ({"teacher": {"model": "t", "endpoint": {"url": "http://localhost:8971/v1"}}}, "an endpoint's url is a loopback address"),
    ({"student": {"model": "./student"}}, "a relative path, which no pod has"),
    ({"sandbox": {"backend": "Process"}}, "beside their credentials"),
]


@pytest.mark.parametrize("spec, says", LOCAL, ids=[says[:32] for _, says in LOCAL])
def test_what_works_on_one_machine_only_is_warned_of_and_not_refused(release: Any, spec: Json, says: str) -> None:
    told = release.create(run(release, **spec))
    assert told.returncode == 0 and says in told.stderr, told.stderr


def test_what_works_on_a_cluster_is_not_warned_of(release: Any) -> None:
    told = release.create(run(release))
    assert told.returncode == 0 and "Warning" not in told.stderr, told.stderr


def test_every_expression_passes_the_type_checker(release: Any) -> None:
    for name in "sandbox-pods", "sandbox-owners", "reserved-labels", "runs", "runs-advice":
        policy = f"validatingadmissionpolicy/dagger-operator-{name}"
        waited = release.kubectl("wait", policy, "--for=jsonpath={.status.observedGeneration}", "--timeout=60s")
        assert waited.returncode == 0, waited.stderr
        assert "expressionWarnings" not in release.kubectl("get", policy, "-o", "json").stdout
