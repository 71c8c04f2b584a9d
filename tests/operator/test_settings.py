"""The operator's environment variables."""

import pytest

from dagger_operator.cluster.settings import InvalidSettings, Settings


def test_nothing_set_is_a_cluster_wide_operator() -> None:
    settings = Settings.read({"PATH": "/bin", "DAGGER_OPERATOR_NAMESPACES": "", "DAGGER_OPERATOR_POD": "operator-1"})
    assert settings.namespaces == ()
    assert (settings.metrics_port, settings.health_port, settings.lease) == (8080, 8081, "dagger-operator")


def test_namespaces_are_listed_with_commas() -> None:
    assert Settings.read({"DAGGER_OPERATOR_NAMESPACES": "lab, team-b,"}).namespaces == ("lab", "team-b")


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("DAGGER_OPERATOR_METRICS_PORT", "http", "integer"),
        ("DAGGER_OPERATOR_HEALTH_PORT", "70000", "65535"),
        ("DAGGER_OPERATOR_NAMESPACES", "Lab", "pattern"),
        ("DAGGER_OPERATOR_WORKERS", "0", "greater than or equal to 1"),
        ("DAGGER_OPERATOR_NAMESPCE", "lab", "DAGGER_OPERATOR_NAMESPACE"),
    ],
)
def test_a_wrong_variable_is_named_with_its_remedy(variable: str, value: str, remedy: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.read({variable: value})
    assert variable in str(caught.value)
    assert remedy in str(caught.value)
