"""The way of a run's metrics: from its pods, through the chart's PodMonitor, to alerts and dashboards."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dagger_operator.api import DAggerRun, Role, load
from dagger_operator.api.ports import AGENT_PORT, METRICS_PORT
from dagger_operator.control import COMPONENT, RUN, Results, steps
from dagger_operator.control.jobs import build_job
from dagger_operator.control.servers import build_server, served
from dagger_operator.store.results import PrepareResult

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "dagger-operator"
DRAWN_OR_WATCHED = [CHART / "files" / "alerts.yaml", *sorted((CHART / "files" / "dashboards").glob("*.json"))]
Json = dict[str, Any]


@pytest.fixture
def pod_monitor(render: Callable[..., list[Json]]) -> Json:
    objects = render({"metrics": {"podMonitor": {"enabled": True}}}, apis=("monitoring.coreos.com/v1/PodMonitor",))
    (monitor,) = (one["spec"] for one in objects if one["kind"] == "PodMonitor")
    return dict(monitor)


def templates() -> Iterator[Json]:
    """Every pod of a run that serves both policies, on one node and on two."""
    sample = yaml.safe_load((ROOT / "manifests" / "samples" / "paper-qwen3-4b-dagger.yaml").read_text())
    run: DAggerRun = load({**sample, "metadata": {**sample["metadata"], "namespace": "lab", "uid": "run-uid"}})
    results = Results({(0, "prepare"): PrepareResult(policy="r000-base", teacher="teacher-1")})
    for step in steps(run.spec):
        yield build_job(run, step, results)["spec"]["template"]
    for role in Role:
        serving = served(run, role)
        assert serving is not None
        yield build_server(run, role, serving, replicas=1)["spec"]["template"]
        group = build_server(run, role, serving.model_copy(update={"nodes": 2}), replicas=1)["spec"]["leaderWorkerTemplate"]
        yield group["leaderTemplate"]
        yield group["workerTemplate"]


def ports(template: Json) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for one in template["spec"]["containers"] for port in one.get("ports", ())}


def test_the_pod_monitor_finds_every_pod_with_metrics_and_the_port_that_has_them(pod_monitor: Json) -> None:
    measured = [
        (template["metadata"]["labels"], name)
        for template in templates()
        for name, port in ports(template).items()
        if port in (METRICS_PORT, AGENT_PORT)
    ]
    assert {labels[COMPONENT] for labels, _ in measured} == {"rollout", "evaluation", "training", "student", "teacher"}
    assert {endpoint["port"] for endpoint in pod_monitor["podMetricsEndpoints"]} == {name for _, name in measured}
    for labels, _ in measured:
        assert pod_monitor["selector"]["matchLabels"].items() <= labels.items()
        assert set(pod_monitor["podTargetLabels"]) <= labels.keys()


def test_alerts_and_dashboards_tell_runs_apart_by_a_label_that_the_pod_monitor_gives(pod_monitor: Json) -> None:
    def as_prometheus_writes(label: str) -> str:
        return re.sub(r"[^a-zA-Z0-9_]", "_", label)

    given = {as_prometheus_writes(label) for label in pod_monitor["podTargetLabels"]}
    for path in DRAWN_OR_WATCHED:
        used = set(re.findall(r"dagger_operator_dev_\w+", path.read_text()))
        assert used <= given, path.name
        assert path.stem == "dagger-fleet" or as_prometheus_writes(RUN) in used, path.name


def test_the_alert_for_a_missing_operator_is_about_the_releases_own(helm: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    values = {"metrics": {"rules": {"enabled": True}}, "watchNamespaces": ["a"]}
    arguments = ["template", "second", CHART, "--namespace", "team-system", "--api-versions", "monitoring.coreos.com/v1/PrometheusRule"]
    rendered = helm(*arguments, "--kube-version", "1.34", "--values", "-", input=json.dumps(values)).stdout
    (rules,) = (one["spec"] for one in yaml.safe_load_all(rendered) if one and one["kind"] == "PrometheusRule")
    (down,) = (rule for group in rules["groups"] for rule in group["rules"] if rule["alert"] == "DaggerOperatorDown")
    assert down["expr"] == 'absent(dagger_operator_leading{namespace="team-system"} == 1)'
    assert down["labels"]["namespace"] == "team-system", "absent() gives no label, and alerts with the same labels are one"
    assert "dagger-system" not in json.dumps(rules)
