"""The operator's environment variables."""

import json

import pytest

from dagger_operator.cluster.settings import InvalidSettings, Settings
from dagger_operator.control import PROMETHEUS


def test_nothing_set_is_a_cluster_wide_operator() -> None:
    settings = Settings.read({"PATH": "/bin", "DAGGER_OPERATOR_NAMESPACES": "", "DAGGER_OPERATOR_POD": "operator-1"})
    assert settings.namespaces == ()
    assert (settings.metrics_port, settings.health_port, settings.lease) == (8080, 8081, "dagger-operator")


def test_namespaces_are_listed_with_commas() -> None:
    assert Settings.read({"DAGGER_OPERATOR_NAMESPACES": "lab, team-b,"}).namespaces == ("lab", "team-b")


def test_scrapers_are_peers_of_a_network_policy_and_prometheus_unless_said_otherwise() -> None:
    assert Settings.read({}).scrapers == PROMETHEUS
    agent = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "vmagent"}}}
    assert Settings.read({"DAGGER_OPERATOR_SCRAPERS": json.dumps([agent])}).scrapers == (agent,)
    assert Settings.read({"DAGGER_OPERATOR_SCRAPERS": "[]"}).scrapers == ()


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("DAGGER_OPERATOR_METRICS_PORT", "http", "integer"),
        ("DAGGER_OPERATOR_HEALTH_PORT", "70000", "65535"),
        ("DAGGER_OPERATOR_NAMESPACES", "Lab", "pattern"),
        ("DAGGER_OPERATOR_WORKERS", "0", "greater than or equal to 1"),
        ("DAGGER_OPERATOR_SCRAPERS", "prometheus", "JSON"),
        ("DAGGER_OPERATOR_SCRAPERS", '[{"pods": {}}]', "podSelector"),
        ("DAGGER_OPERATOR_SCRAPERS", "[{}]", "at least 1 item"),
        ("DAGGER_OPERATOR_NAMESPCE", "lab", "DAGGER_OPERATOR_NAMESPACE"),
    ],
)
def test_a_wrong_variable_is_named_with_its_remedy(variable: str, value: str, remedy: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.read({variable: value})
    assert variable in str(caught.value)
    assert remedy in str(caught.value)
