"""The dashboards as the chart brings them."""

import json
from typing import Any

import pytest

from fixtures.tools import ROOT

pytestmark = pytest.mark.heavy


def test_dashboards_come_only_when_asked_for(render: Any) -> None:
    assert not [one for one in render() if one["metadata"]["name"].endswith("-dashboard")]


def test_a_dashboard_arrives_whole_where_grafanas_sidecar_looks(render: Any) -> None:
    values = {"metrics": {"dashboards": {"enabled": True, "annotations": {"grafana_folder": "DAgger"}}}}
    made = {one["metadata"]["name"]: one for one in render(values) if one["metadata"]["name"].endswith("-dashboard")}
    assert made.keys() == {"dagger-operator-fleet-dashboard", "dagger-operator-run-dashboard"}
    for one in made.values():
        assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert one["metadata"]["annotations"] == {"grafana_folder": "DAgger"}
        for name, content in one["data"].items():
            assert json.loads(content) == json.loads((ROOT / "helm/dagger-operator/files/dashboards" / name).read_text())
