"""The alerts that the chart brings: over metrics that exist, each told what to do about, and firing when they should and only then."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from dagger_operator.cluster.metrics import Metrics
from dagger_operator.policy.metrics import GatewayMetrics
from dagger_operator.rollout.metrics import WorkerMetrics
from dagger_operator.store.layout import Kind
from fixtures.metrics import PROMETHEUS_ADDS

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm/dagger-operator/files/alerts.yaml"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_rests_on_documented_metrics_and_is_documented_itself(alert: dict[str, Any], documented_metrics: Any) -> None:
    known = {name: row for section, table in documented_metrics.tables.items() if section != "Alerts" for name, row in table.items()}
    uses = re.findall(r"(dagger_(?!operator_dev)\w+)(?:\{([^}]*)\})?", alert["expr"])
    assert uses
    for name, matchers in uses:
        kind, labels = known[name.removesuffix("_count")]
        assert name.endswith("_count") == (kind == "histogram")
        for label, negated, values in re.findall(r'(\w+)(!?)=~?"([^"]*)"', matchers):
            closed = labels[label] if label not in PROMETHEUS_ADDS else None
            assert closed is None or set(values.split("|")) <= closed, f"{name}: no {label} is {negated}{values}"
    severity, _ = documented_metrics.tables["Alerts"][alert["alert"]]
    assert severity == alert["labels"]["severity"]


def test_what_an_alert_takes_an_increase_of_is_there_from_the_start() -> None:
    """A counter that appears at 16 has no increase."""
    workers, operator = CollectorRegistry(), Metrics().registry
    WorkerMetrics(workers, Kind.ROLLOUT)
    GatewayMetrics(workers)
    there = generate_latest(workers).decode() + generate_latest(operator).decode()
    taken = {use for alert in ALERTS for use in re.findall(r"(?:increase|rate)\((\w+)(?:\{([^}]*)\})?", alert["expr"])}
    assert len(taken) > 3
    for name, matcher in taken:
        assert re.search(rf"^{name}(\{{.*{matcher}.*\}})? 0\.0$", there, re.M), f"{name}{{{matcher}}} appears with its first event"


def test_every_documented_alert_exists(documented_metrics: Any) -> None:
    assert documented_metrics.tables["Alerts"].keys() == {alert["alert"] for alert in ALERTS}


@pytest.mark.heavy
def test_alerts_fire_when_they_should_and_only_then(prometheus_programs: Path) -> None:
    for command in (["check", "rules", RULES], ["test", "rules", ROOT / "tests/metrics/alerts.yaml"]):
        done = subprocess.run([prometheus_programs / "promtool", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
    tested = set(re.findall(r"alertname: (\w+)", (ROOT / "tests/metrics/alerts.yaml").read_text()))
    assert tested == {alert["alert"] for alert in ALERTS}
