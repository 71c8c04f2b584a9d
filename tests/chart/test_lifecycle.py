"""Install, upgrade and uninstall on a real API server, by Helm and by plain manifests; and the samples."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "dagger-operator"
SAMPLES = sorted((ROOT / "manifests" / "samples").rglob("*.yaml"))
Json = dict[str, Any]

MADE = (
    "deployments,services,serviceaccounts,secrets,persistentvolumeclaims,roles,rolebindings,clusterroles,clusterrolebindings,"
    "networkpolicies,namespaces,validatingadmissionpolicies,validatingadmissionpolicybindings,priorityclasses,pods,leases"
)


@pytest.fixture
def helm_on(helm: Callable[..., Any], control_plane: Any, namespace: str) -> Iterator[Callable[..., str]]:
    """Helm for a release of this test's own, which is uninstalled at the end."""

    def call(*arguments: str | Path, values: Json | None = None) -> str:
        given = ["--values", "-"] if values is not None else []
        where = ["--kubeconfig", control_plane.kubeconfig, "--namespace", namespace]
        done: subprocess.CompletedProcess[str] = helm(*where, *arguments, *given, input=json.dumps(values) if given else None)
        return done.stdout

    yield call
    if "lifecycle" in call("list", "--short"):
        call("uninstall", "lifecycle")


def test_runs_outlive_upgrades_and_the_chart_itself(helm_on: Callable[..., str], control_plane: Any, namespace: str) -> None:
    values: Json = {
        "sandbox": {"namespace": f"{namespace}-sandboxes", "priorityClass": {"create": True, "name": f"{namespace}-sandbox"}},
        "watchNamespaces": [namespace],
        "s3": {"enabled": True},
    }
    # Another one installed the CRD here, as `kubectl apply` does before someone turns to Helm.
    helm_on("install", "lifecycle", CHART, "--take-ownership", values=values)
    run = ROOT / "manifests" / "samples" / "paper-qwen3-4b-dagger.yaml"
    control_plane.kubectl("apply", "-f", run, f"--namespace={namespace}")
    keys = control_plane.kubectl("get", "secret", "lifecycle-dagger-operator-s3", f"--namespace={namespace}", "-o", "jsonpath={.data}")

    helm_on("upgrade", "lifecycle", CHART, values={**values, "replicas": 2, "podDisruptionBudget": {"enabled": True}})
    seen = json.loads(control_plane.kubectl("get", "deployment", "lifecycle-dagger-operator", f"--namespace={namespace}", "-o", "json"))
    assert seen["spec"]["replicas"] == 2 and seen["spec"]["strategy"]["type"] == "RollingUpdate"
    upgraded = control_plane.kubectl("get", "secret", "lifecycle-dagger-operator-s3", f"--namespace={namespace}", "-o", "jsonpath={.data}")
    assert upgraded == keys, "an upgrade changed the keys that runs use"
    control_plane.kubectl("get", "daggerrun", "qwen3-4b-dagger", f"--namespace={namespace}")

    helm_test_succeeds(helm_on, control_plane, namespace)
    helm_on("uninstall", "lifecycle", "--wait")
    control_plane.kubectl("get", "daggerrun", "qwen3-4b-dagger", f"--namespace={namespace}")
    control_plane.kubectl("wait", "--for=delete", f"namespace/{namespace}-sandboxes", "--timeout=60s")
    selector = "app.kubernetes.io/instance=lifecycle"
    left = control_plane.kubectl("get", MADE, "--all-namespaces", "-l", selector, "-o", "name").split()
    assert left == ["persistentvolumeclaim/lifecycle-dagger-operator-s3"], "the claim holds runs' data; nothing else stays"


def helm_test_succeeds(helm_on: Callable[..., str], control_plane: Any, namespace: str) -> None:
    """`helm test`, whose pod ends well because this says so: there is no node."""
    pod = ["pod/lifecycle-dagger-operator-test", f"--namespace={namespace}"]
    with ThreadPoolExecutor(1) as beside:
        test = beside.submit(helm_on, "test", "lifecycle", "--timeout=90s")
        control_plane.kubectl("wait", "--for=create", *pod, "--timeout=60s")
        control_plane.kubectl("patch", *pod, "--subresource=status", "--type=merge", "--patch", '{"status": {"phase": "Succeeded"}}')
        assert "Succeeded" in test.result()


def test_a_sandbox_namespace_of_ones_own_is_labelled_as_helm_says_and_stays(
    helm_on: Callable[..., str], control_plane: Any, namespace: str
) -> None:
    standards = {"enforce": "restricted", "warn": "restricted", "audit": "baseline"}
    with control_plane.fresh_namespace() as own:
        spec = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        closed = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "default-deny"}, "spec": spec}
        control_plane.kubectl("create", "-f", "-", f"--namespace={own}", input=json.dumps(closed))
        sandbox = {"namespace": own, "createNamespace": False, "podSecurity": standards, "priorityClass": {"name": f"{namespace}-sandbox"}}
        values = {"crds": {"install": False}, "watchNamespaces": [namespace], "sandbox": sandbox}
        (command,) = re.findall(r"^  kubectl (label .*)$", helm_on("install", "lifecycle", CHART, values=values), re.M)
        control_plane.kubectl(*command.split())
        helm_on("uninstall", "lifecycle", "--wait")

        labels = json.loads(control_plane.kubectl("get", "namespace", own, "-o", "json"))["metadata"]["labels"]
        assert {f"pod-security.kubernetes.io/{mode}": level for mode, level in standards.items()}.items() <= labels.items()
        left = control_plane.kubectl("get", "networkpolicies,roles,rolebindings", f"--namespace={own}", "-o", "name").split()
        assert left == ["networkpolicy.networking.k8s.io/default-deny"]


def test_an_api_server_takes_the_plain_manifests_as_they_stand(control_plane: Any) -> None:
    documents = [one for one in yaml.safe_load_all((ROOT / "manifests" / "install.yaml").read_text()) if one]
    homes = [one["metadata"]["name"] for one in documents if one["kind"] == "Namespace"]
    for name in homes:
        control_plane.kubectl("create", "namespace", name)
    try:
        accepted = control_plane.kubectl(
            "apply",
            "--server-side",
            "--validate=strict",
            "--dry-run=server",
            "-f",
            ROOT / "manifests" / "crd",
            "-f",
            ROOT / "manifests" / "install.yaml",
        )
        assert len(accepted.splitlines()) == len(documents) + 1
        assert "Warning" not in accepted
    finally:
        control_plane.kubectl("delete", "namespace", *homes)


def test_everything_that_the_chart_can_make_is_accepted(render: Callable[..., list[Json]], control_plane: Any, namespace: str) -> None:
    everything: Json = {
        "crds": {"install": False},
        "replicas": 2,
        "podDisruptionBudget": {"enabled": True},
        "commonLabels": {"team": "agents"},
        "tolerations": [{"key": "control", "operator": "Exists"}],
        "nodeSelector": {"pool": "control"},
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "extraEnv": [{"name": "AWS_REGION", "value": "eu-central-1"}],
        "sandbox": {
            "resourceQuota": {"pods": "512", "limits.memory": "2Ti"},
            "limitRange": [{"type": "Container", "max": {"cpu": "8"}}],
            "priorityClass": {"create": True, "name": "sandbox-of-the-test"},
        },
        "s3": {"enabled": True, "copySecretTo": ["elsewhere"], "persistence": {"storageClass": "standard"}},
    }
    objects = [one for one in render(everything) if one["kind"] != "Namespace"]
    for one in objects:
        if "namespace" in one["metadata"]:
            one["metadata"]["namespace"] = namespace
        if one["kind"] == "Pod":
            one["spec"]["serviceAccountName"] = "default"  # a dry run makes no other
    unique = {(one["kind"], one["metadata"]["name"]): one for one in objects}  # its roles in three namespaces share a name
    made = {"apiVersion": "v1", "kind": "List", "items": list(unique.values())}
    control_plane.kubectl("apply", "--server-side", "--validate=strict", "--dry-run=server", "-f", "-", input=json.dumps(made))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_api_server_accepts_every_sample(control_plane: Any, namespace: str, path: Path) -> None:
    control_plane.kubectl("apply", "--validate=strict", "--dry-run=server", "-f", path, f"--namespace={namespace}")
