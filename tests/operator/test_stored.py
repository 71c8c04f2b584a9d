"""What another version of the CRD left in the API server."""

from datetime import UTC, datetime
from typing import Any

import pytest

from dagger_operator.api import InvalidRun
from dagger_operator.cluster.reconcile import _loaded, _shell
from dagger_operator.control import refused

STORED: dict[str, Any] = {
    "apiVersion": "dagger-operator.dev/v1alpha1",
    "kind": "DAggerRun",
    "metadata": {"name": "demo", "namespace": "lab", "uid": "u", "generation": 4, "resourceVersion": "7"},
    "spec": {
        "student": {"model": "m"},
        "teacher": {"model": "t", "endpoint": {"url": "https://t/v1"}},
        "tasks": {"source": {"type": "JSONL", "uri": "t"}, "heldOut": {"source": {"type": "JSONL", "uri": "h"}}},
        "storage": {"url": "s3://bucket/prefix"},
    },
}


def test_a_status_of_another_version_is_made_anew() -> None:
    run = _loaded({**STORED, "status": {"phase": "Rollout", "epoch": 3}})
    assert run.status is None
    kept = _loaded({**STORED, "status": {"phase": "Rollout", "round": 2}})
    assert kept.status is not None
    assert kept.status.round == 2


@pytest.mark.parametrize("status", [None, {"phase": "Rollout"}, {"phase": "Unheard"}, {"epoch": 3}])
def test_a_spec_that_is_not_understood_is_refused_in_the_status(status: Any) -> None:
    stored = {**STORED, "spec": {**STORED["spec"], "teachers": 2}, "status": status}
    with pytest.raises(InvalidRun) as caught:
        _loaded(stored)
    said = refused(_shell(stored), caught.value.problems, datetime(2026, 1, 1, tzinfo=UTC))
    assert (said.reason, said.observed_generation) == ("InvalidSpec", 4)
    assert "spec.teachers" in said.conditions[0].message
