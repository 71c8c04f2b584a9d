"""What the chart makes of its values, and which values it refuses. Rendered by the real Helm, without a cluster."""

import copy
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dagger_operator.cluster.settings import Settings
from dagger_operator.control import PROMETHEUS

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "dagger-operator"
Json = dict[str, Any]
Render = Callable[..., list[Json]]
Pods = Callable[[list[Json]], Iterator[Json]]

EVERYTHING: Json = {
    "commonLabels": {"team": "agents"},
    "replicas": 2,
    "podDisruptionBudget": {"enabled": True},
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"pool": "control"},
    "tolerations": [{"key": "control", "operator": "Exists"}],
    "extraEnv": [{"name": "AWS_REGION", "value": "eu-central-1"}],
    "podAnnotations": {"note": "yes"},
    "podLabels": {"tier": "control"},
    "priorityClassName": "system-cluster-critical",
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/dagger"}},
    "sandbox": {
        "resourceQuota": {"pods": "512"},
        "limitRange": [{"type": "Container", "max": {"cpu": "8"}}],
    },
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "podMonitor": {"enabled": True},
        "rules": {"enabled": True},
    },
    "s3": {"enabled": True},
}
DIGEST = "sha256:" + "0" * 64
MONITORING = tuple(f"monitoring.coreos.com/v1/{kind}" for kind in ("ServiceMonitor", "PodMonitor", "PrometheusRule"))


def named(objects: list[Json], kind: str, name: str) -> Json:
    (one,) = (one for one in objects if one["kind"] == kind and one["metadata"]["name"] == name)
    return one


def all_of(objects: list[Json], kind: str) -> list[Json]:
    return [one for one in objects if one["kind"] == kind]


def operator_env(objects: list[Json]) -> dict[str, Any]:
    (container,) = named(objects, "Deployment", "dagger-operator")["spec"]["template"]["spec"]["containers"]
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


def test_lint_has_nothing_to_say(helm: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    helm("lint", "--strict", "--kube-version", "1.34", CHART)


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_every_object_says_whose_it_is_and_none_passes_for_a_runs(render: Render, values: Json) -> None:
    objects = render(values, apis=MONITORING)
    for one in objects:
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == labels["app.kubernetes.io/instance"] == "dagger-operator"
        assert labels["app.kubernetes.io/managed-by"] == "Helm" and labels["app.kubernetes.io/component"]
        assert labels.get("team") == values.get("commonLabels", {}).get("team")
    names = [(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in objects]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_every_pod_of_the_chart_satisfies_the_restricted_standard(render: Render, pods: Pods, values: Json) -> None:
    found = list(pods(render(values, apis=MONITORING)))
    assert len(found) == (3 if values else 2)
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] and container["resources"]["limits"]


def test_the_operator_is_told_its_settings(render: Render) -> None:
    assert operator_env(render()) == {
        "DAGGER_OPERATOR_NAMESPACES": "",
        "DAGGER_OPERATOR_NAMESPACE": {"fieldRef": {"fieldPath": "metadata.namespace"}},
        "DAGGER_OPERATOR_POD": {"fieldRef": {"fieldPath": "metadata.name"}},
        "DAGGER_OPERATOR_LEASE": "dagger-operator",
        "DAGGER_OPERATOR_WORKER_IMAGE": "dagger-operator/worker:0.1.0",
        "DAGGER_OPERATOR_TRAINER_IMAGE": "dagger-operator/trainer:0.1.0",
        "DAGGER_OPERATOR_SANDBOX_NAMESPACE": "dagger-sandboxes",
        "DAGGER_OPERATOR_HELPER_IMAGE": "dagger-operator/sandbox-helper:0.1.0",
        "DAGGER_OPERATOR_SANDBOX_PRIORITY_CLASS": "dagger-operator-sandbox",
        "DAGGER_OPERATOR_SCRAPERS": json.dumps(PROMETHEUS, separators=(",", ":")),
        "DAGGER_OPERATOR_METRICS_PORT": "8080",
        "DAGGER_OPERATOR_HEALTH_PORT": "8081",
    }
    runs = {"workerImage": "registry/worker:1", "trainerImage": "registry/trainer:1"}
    values = {"watchNamespaces": ["a", "b"], "sandbox": {"helperImage": "registry/helper:1"}, "runs": runs, "metrics": {"scrapers": []}}
    told = operator_env(render(values))
    settings = Settings.read({**told, "DAGGER_OPERATOR_NAMESPACE": "dagger-system", "DAGGER_OPERATOR_POD": "dagger-operator-0"})
    assert settings.namespaces == ("a", "b") and settings.helper_image == "registry/helper:1"
    assert settings.scrapers == ()
    assert (settings.worker_image, settings.trainer_image) == ("registry/worker:1", "registry/trainer:1")


def test_no_setting_of_the_operator_is_invented(render: Render) -> None:
    (pod,) = (one["spec"]["template"]["spec"] for one in all_of(render(), "Deployment"))
    # Kubernetes would put DAGGER_OPERATOR_SERVICE_HOST and the like there, and unknown settings are refused.
    assert pod["enableServiceLinks"] is False


def test_watching_some_namespaces_gives_rights_there_and_nowhere_else(render: Render) -> None:
    everywhere, some = render(), render({"watchNamespaces": ["a", "b"]})
    (rules,) = (one["rules"] for one in all_of(everywhere, "ClusterRole") if one["metadata"]["name"] == "dagger-operator")
    assert not all_of(some, "ClusterRoleBinding")
    assert all(one["metadata"]["name"].endswith(("-view", "-edit")) for one in all_of(some, "ClusterRole"))
    for namespace in "a", "b":
        (role,) = (one for one in all_of(some, "Role") if one["metadata"]["namespace"] == namespace)
        (binding,) = (one for one in all_of(some, "RoleBinding") if one["metadata"]["namespace"] == namespace)
        assert role["rules"] == rules and binding["roleRef"]["name"] == role["metadata"]["name"]
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "dagger-operator", "namespace": "dagger-system"}]
    selected = {"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["a", "b"]}]}
    (_, commands, gateway) = all_of(some, "NetworkPolicy")
    assert commands["spec"]["ingress"][0]["from"][0]["namespaceSelector"] == selected
    assert gateway["spec"]["egress"][0]["to"][0]["namespaceSelector"] == selected
    test = named(some, "Pod", "dagger-operator-test")["spec"]["containers"][0]["command"]
    assert test[-2:] == ["a", "b"]


def test_no_rule_takes_more_than_it_names(render: Render) -> None:
    for one in render():
        for rule in one.get("rules", ()):
            assert "*" not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]
            if "secrets" in rule["resources"]:
                assert rule["verbs"] == ["get"]


def test_the_sandbox_namespace_is_closed_both_ways(render: Render) -> None:
    objects = render()
    labels = named(objects, "Namespace", "dagger-sandboxes")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "baseline" and labels["pod-security.kubernetes.io/warn"] == "restricted"
    (deny, commands, gateway) = all_of(objects, "NetworkPolicy")
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    workers = {
        "namespaceSelector": {},
        "podSelector": {
            "matchLabels": {"app.kubernetes.io/managed-by": "dagger-operator"},
            "matchExpressions": [{"key": "dagger-operator.dev/component", "operator": "In", "values": ["rollout", "evaluation"]}],
        },
    }
    assert commands["spec"]["policyTypes"] == ["Ingress"] and gateway["spec"]["policyTypes"] == ["Egress"]
    assert commands["spec"]["ingress"] == [{"from": [workers], "ports": [{"protocol": "TCP", "port": 7070}]}]
    assert gateway["spec"]["egress"] == [{"to": [workers], "ports": [{"protocol": "TCP", "port": 8090}]}]
    assert gateway["spec"]["podSelector"] == {"matchLabels": {"dagger-operator.dev/network": "gateway"}}


def test_a_sandbox_namespace_of_ones_own_is_prepared_like_the_charts(render: Render) -> None:
    objects = render({"sandbox": {"createNamespace": False}})
    assert objects == [one for one in render() if one["kind"] != "Namespace"]
    # Somebody has prepared it, perhaps with policies of the usual names.
    assert all(one["metadata"]["name"].startswith("dagger-sandbox-") for one in all_of(objects, "NetworkPolicy"))


def test_without_sandbox_pods_nothing_of_them_is_there(render: Render) -> None:
    objects = render({"sandbox": {"enabled": False}})
    assert "dagger-sandboxes" not in yaml.safe_dump(objects)
    assert "DAGGER_OPERATOR_SANDBOX_NAMESPACE" not in operator_env(objects)


AUTOSCALER_CUTOFF = -10
"""Default of cluster-autoscaler's `--expendable-pods-priority-cutoff`: a pod below it gets no new node."""


def test_sandboxes_give_way_to_everything_else_and_a_cluster_grows_for_them_all_the_same(render: Render) -> None:
    (made,) = all_of(render(), "PriorityClass")
    assert AUTOSCALER_CUTOFF <= made["value"] < 0
    assert made["preemptionPolicy"] == "Never" and not made.get("globalDefault")
    assert operator_env(render())["DAGGER_OPERATOR_SANDBOX_PRIORITY_CLASS"] == made["metadata"]["name"]


@pytest.mark.parametrize(
    ("values", "made", "told"),
    [
        ({"name": "ours"}, ["ours"], "ours"),
        ({"create": False}, [], None),
        ({"create": False, "name": "theirs"}, [], "theirs"),
    ],
    ids=["another name", "none", "one that is there"],
)
def test_who_may_make_no_priority_class_gets_none_or_names_one(render: Render, values: Json, made: list[str], told: str | None) -> None:
    objects = render({"sandbox": {"priorityClass": values}})
    assert [one["metadata"]["name"] for one in all_of(objects, "PriorityClass")] == made
    assert operator_env(objects).get("DAGGER_OPERATOR_SANDBOX_PRIORITY_CLASS") == told
    Settings.read({name: value for name, value in operator_env(objects).items() if isinstance(value, str)})


def test_the_crd_stays_unless_told_otherwise(render: Render) -> None:
    (kept,) = all_of(render(), "CustomResourceDefinition")
    assert kept["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    source = yaml.safe_load((ROOT / "manifests" / "crd" / "daggerruns.yaml").read_text())
    assert kept["spec"] == source["spec"]
    (goes,) = all_of(render({"crds": {"keep": False}}), "CustomResourceDefinition")
    assert "annotations" not in goes["metadata"]
    assert not all_of(render({"crds": {"install": False}}), "CustomResourceDefinition")


def test_a_further_release_makes_nothing_that_the_first_one_made(helm: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    def made(release: str, values: Json) -> set[tuple[str, str, str]]:
        arguments = ["template", release, CHART, "--namespace", release, "--kube-version", "1.34", "--values", "-"]
        objects = yaml.load_all(helm(*arguments, input=json.dumps(values)).stdout, yaml.CSafeLoader)
        return {(one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]) for one in objects if one}

    first = made("first", {"watchNamespaces": ["a"]})
    apart = {"watchNamespaces": ["b"], "crds": {"install": False}, "sandbox": {"namespace": "b-sandboxes"}}
    assert not first & made("second", apart)
    shared = {kind for kind, _, _ in first & made("second", {"watchNamespaces": ["b"]})}
    assert shared == {"CustomResourceDefinition", "Namespace", "NetworkPolicy", "Role"}, "docs/operating.md says what to set"


def test_optional_objects_are_made_when_asked_for(render: Render) -> None:
    base, full = render(), render(EVERYTHING, apis=MONITORING)
    added = {one["kind"] for one in full} - {one["kind"] for one in base}
    monitors, bounds = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}, {"PodDisruptionBudget", "ResourceQuota", "LimitRange"}
    assert added == monitors | bounds | {"PersistentVolumeClaim", "Secret"}
    pod = named(full, "Deployment", "dagger-operator")["spec"]["template"]
    assert pod["metadata"]["labels"]["tier"] == "control" and pod["metadata"]["annotations"] == {"note": "yes"}
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}] and pod["spec"]["nodeSelector"] == {"pool": "control"}
    assert operator_env(full)["AWS_REGION"] == "eu-central-1"
    account = named(full, "ServiceAccount", "dagger-operator")
    assert account["metadata"]["annotations"] == EVERYTHING["serviceAccount"]["annotations"]
    (monitor,) = all_of(full, "ServiceMonitor")
    service = named(full, "Service", "dagger-operator")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (runs,) = all_of(full, "PodMonitor")
    assert runs["spec"]["namespaceSelector"] == {"any": True}
    (rules,) = all_of(full, "PrometheusRule")
    assert rules["spec"] == yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())


def test_services_select_the_pods_that_they_are_for(render: Render) -> None:
    objects = render(EVERYTHING, apis=MONITORING)
    for service in all_of(objects, "Service"):
        selector = service["spec"]["selector"].items()
        selected = [one for one in all_of(objects, "Deployment") if selector <= one["spec"]["template"]["metadata"]["labels"].items()]
        assert [one["metadata"]["name"] for one in selected] == [service["metadata"]["name"]]
        ports = [
            port["name"] for one in selected for container in one["spec"]["template"]["spec"]["containers"] for port in container["ports"]
        ]
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(ports)


@pytest.mark.parametrize("replicas, strategy", [(1, "Recreate"), (2, "RollingUpdate")])
def test_a_single_operator_is_replaced_and_several_roll(render: Render, replicas: int, strategy: str) -> None:
    assert named(render({"replicas": replicas}), "Deployment", "dagger-operator")["spec"]["strategy"] == {"type": strategy}


def test_an_image_may_be_pinned_by_digest(render: Render, pods: Pods) -> None:
    images = {pod["containers"][0]["image"] for pod in pods(render({"image": {"repository": "registry/operator", "digest": DIGEST}}))}
    assert images == {f"registry/operator@{DIGEST}"}


@pytest.mark.parametrize(
    ("image", "pulled"),
    [
        ({"tag": "v1.9"}, "mirror/versitygw:v1.9"),
        ({"tag": "1.8.0-2"}, "mirror/versitygw:1.8.0-2"),
        ({"tag": "v1.10.0-rc.1"}, "mirror/versitygw:v1.10.0-rc.1"),
        ({"digest": DIGEST}, f"mirror/versitygw@{DIGEST}"),
        ({"tag": "latest", "digest": DIGEST}, f"mirror/versitygw@{DIGEST}"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_s3_servers_image_is_a_version_or_pinned_by_digest(render: Render, image: Json, pulled: str) -> None:
    objects = render({"s3": {"enabled": True, "image": {"repository": "mirror/versitygw", **image}}})
    (container,) = named(objects, "Deployment", "dagger-operator-s3")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == pulled


def test_the_s3_server_takes_credentials_and_claims_of_others(render: Render) -> None:
    objects = render({"s3": {"enabled": True, "existingSecret": "mine", "persistence": {"existingClaim": "ours"}}})
    assert not all_of(objects, "Secret") and not all_of(objects, "PersistentVolumeClaim")
    pod = named(objects, "Deployment", "dagger-operator-s3")["spec"]["template"]["spec"]
    assert {one["valueFrom"]["secretKeyRef"]["name"] for one in pod["containers"][0]["env"]} == {"mine"}
    assert {"name": "buckets", "persistentVolumeClaim": {"claimName": "ours"}} in pod["volumes"]


def test_copies_of_the_s3_secret_hold_the_same_keys(render: Render) -> None:
    secrets = all_of(render({"s3": {"enabled": True, "copySecretTo": ["a", "dagger-system"]}}), "Secret")
    assert [one["metadata"]["namespace"] for one in secrets] == ["dagger-system", "a"]
    assert secrets[0]["data"] == secrets[1]["data"] and set(secrets[0]["data"]) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


REFUSED = [
    ({"replica": 2}, "replica"),
    ({"image": {"tagg": "1"}}, "tagg"),
    ({"image": {"digest": "latest"}}, "digest"),
    ({"replicas": "2"}, "replicas"),
    ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    ({"watchNamespaces": ["Not_A_Name"]}, "watchNamespaces"),
    ({"sandbox": {"podSecurity": {"enforce": "strict"}}}, "enforce"),
    ({"admissionPolicies": {"validationActions": []}}, "validationActions"),
    ({"admissionPolicies": {"validationActions": ["Deny", "Warn"]}}, "validationActions"),
    ({"metrics": {"serviceMonitor": {"interval": "soon"}}}, "interval"),
    ({"metrics": {"scrapers": [{}]}}, "scrapers"),
    ({"metrics": {"scrapers": [{"pods": {}}]}}, "scrapers"),
    ({"sandbox": {"namespace": "dagger-system"}}, 'sandbox.namespace "dagger-system" holds the operator or runs'),
    ({"watchNamespaces": ["dagger-sandboxes"]}, 'sandbox.namespace "dagger-sandboxes" holds the operator or runs'),
    ({"podDisruptionBudget": {"enabled": True}}, "set replicas to 2 or more"),
    ({"s3": {"enabled": True, "image": {"tag": "v1.7.0"}}}, "write v1.8.0 or newer"),
    ({"s3": {"enabled": True, "image": {"tag": "v1.7.9", "digest": DIGEST}}}, 's3.image.tag "v1.7.9" loses conditional writes'),
    ({"s3": {"enabled": True, "image": {"tag": "latest"}}}, 's3.image.tag "latest" does not tell its version'),
    ({"s3": {"enabled": True, "image": {"tag": "2026.01-mirror"}}}, "write a version, or s3.image.digest"),
    ({"s3": {"enabled": True, "image": {"tag": "v1.8.0_2"}}}, "write a version, or s3.image.digest"),
    ({"s3": {"enabled": True, "image": {"tag": "v2"}}}, "write a version, or s3.image.digest"),
    ({"s3": {"image": {"digest": "latest"}}}, "digest"),
    ({"s3": {"existingSecret": "mine", "copySecretTo": ["a"]}}, "leave it out beside s3.existingSecret"),
    ({"metrics": {"serviceMonitor": {"enabled": True}}}, "install the Prometheus Operator first"),
    ({"metrics": {"rules": {"enabled": True}}}, "metrics.rules.enabled needs the API monitoring.coreos.com/v1 PrometheusRule"),
    ({"metrics": {"podMonitor": {"enabled": True}}}, "metrics.podMonitor.enabled needs the API monitoring.coreos.com/v1 PodMonitor"),
]


@pytest.mark.parametrize("values, says", REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_values_that_cannot_work_are_refused_with_the_remedy(render: Render, values: Json, says: str) -> None:
    with pytest.raises(Exception, match="Error") as refused:
        render(values)
    assert says in str(refused.value)


def test_the_plain_manifests_are_the_charts(render: Render) -> None:
    plain = [one for one in yaml.safe_load_all((ROOT / "manifests" / "install.yaml").read_text()) if one]
    assert plain.pop(0)["metadata"]["name"] == "dagger-system"
    rendered = copy.deepcopy([one for one in render({"crds": {"install": False}}) if one["kind"] != "Pod"])
    for one in rendered:
        for labels in (one["metadata"]["labels"], one["spec"]["template"]["metadata"]["labels"] if one["kind"] == "Deployment" else {}):
            for label in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
                labels.pop(label, None)
    assert plain == rendered, "run `make generate`"
