"""kubeconform, which needs no cluster, with the schemas that the API server publishes: what a dry run does not see are keys given twice."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "dagger-operator"
Json = dict[str, Any]
Conform = Callable[[str], str]

OURS = "apis/dagger-operator.dev/v1alpha1"
OF_THE_PROMETHEUS_OPERATOR = "ServiceMonitor,PodMonitor,PrometheusRule"
EVERYTHING: Json = {
    "replicas": 2,
    "podDisruptionBudget": {"enabled": True},
    "sandbox": {
        "resourceQuota": {"pods": "512"},
        "limitRange": [{"type": "Container", "max": {"cpu": "8"}}],
    },
    "s3": {"enabled": True, "copySecretTo": ["elsewhere"]},
    "metrics": {part: {"enabled": True} for part in ("serviceMonitor", "podMonitor", "rules", "dashboards")},
}


@pytest.fixture(scope="module")
def conform(control_plane: Any, tmp_path_factory: pytest.TempPathFactory) -> Conform:
    """What kubeconform finds wrong in YAML documents; nothing where all is well."""
    build = subprocess.run([sys.executable, ROOT / "scripts" / "build-tool", "kubeconform"], stdout=subprocess.PIPE, text=True, check=True)
    schemas = tmp_path_factory.mktemp("schemas")
    write_schemas(control_plane, schemas)
    place = f"{schemas}/{{{{.ResourceKind}}}}_{{{{.Group}}}}_{{{{.ResourceAPIVersion}}}}.json"
    command = [build.stdout.strip(), "-strict", "-skip", OF_THE_PROMETHEUS_OPERATOR, "-schema-location", place, "-"]

    def call(text: str) -> str:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
        assert bool(done.returncode) == bool(done.stdout), f"{done.stdout}{done.stderr}"
        return done.stdout

    return call


def write_schemas(control_plane: Any, folder: Path) -> None:
    """A file for each kind that the API server serves in version v1, and for ours."""
    paths: Json = {}
    while OURS not in paths:  # published a moment after the CRD is accepted
        paths = json.loads(control_plane.kubectl("get", "--raw", "/openapi/v3"))["paths"]
    for path in paths:
        _, *own = path.split("/")
        if own[-1:] != ["v1"] and path != OURS:
            continue
        schemas = json.loads(control_plane.kubectl("get", "--raw", f"/openapi/v3/{path}"))["components"]["schemas"]
        components = {"schemas": {name: strict(schema) for name, schema in schemas.items()}}
        for name, schema in schemas.items():
            for kind in schema.get("x-kubernetes-group-version-kind", ()):
                if [part for part in (kind["group"], kind["version"]) if part] == own:
                    whole = {"$ref": f"#/components/schemas/{name}", "components": components}
                    (folder / f"{kind['kind'].lower()}_{own[0]}_{own[-1]}.json").write_text(json.dumps(whole))


def strict(node: Any) -> Any:
    """A schema whose objects have no properties but the known ones."""
    if isinstance(node, list):
        return [strict(one) for one in node]
    if not isinstance(node, dict):
        return node
    made = {key: strict(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_what_the_chart_makes_conforms(helm: Callable[..., Any], conform: Conform, values: Json) -> None:
    apis = [f"--api-versions=monitoring.coreos.com/v1/{kind}" for kind in OF_THE_PROMETHEUS_OPERATOR.split(",")]
    command = ["template", "dagger-operator", CHART, "--namespace", "dagger-system", "--kube-version", "1.34", *apis, "--values", "-"]
    assert conform(helm(*command, input=json.dumps(values)).stdout) == ""


@pytest.mark.parametrize("path", sorted((ROOT / "manifests").rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_manifest_conforms(conform: Conform, path: Path) -> None:
    assert conform(path.read_text()) == ""


SERVICE = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports: [{port: 80}]\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SERVICE + "  selectr: {a: b}\n", "selectr"),
        (SERVICE.replace("80", "http"), "got string, want integer"),
        (SERVICE + "  ports: []\n", '"ports" already set'),
        (SERVICE.replace("v1", "v2"), "could not find schema"),
        ((ROOT / "manifests" / "samples" / "paper-qwen3-4b-dagger.yaml").read_text().replace("rounds:", "round:"), "round"),
    ],
    ids=["an unknown field", "another type", "a key given twice", "a kind that is not served", "an unknown field of a run"],
)
def test_what_does_not_conform_is_found(conform: Conform, text: str, says: str) -> None:
    assert says in conform(text)


def test_a_dry_run_does_not_see_a_key_that_is_given_twice(control_plane: Any, namespace: str) -> None:
    """Why kubeconform is here beside it; where this test fails, it has no place any more."""
    twice = SERVICE + "  ports: [{port: 81}]\n"
    assert len(yaml.safe_load(twice)["spec"]["ports"]) == 1
    dry_run = ("apply", "--server-side", "--validate=strict", "--dry-run=server", f"--namespace={namespace}", "-f", "-")
    assert "serverside-applied" in control_plane.kubectl(*dry_run, input=twice)
