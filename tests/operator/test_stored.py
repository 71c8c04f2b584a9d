"""What another version of the CRD left in the API server."""

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from dagger_operator.api import InvalidRun
from dagger_operator.cluster.cache import Cache
from dagger_operator.cluster.health import Health
from dagger_operator.cluster.queue import WorkQueue
from dagger_operator.cluster.readings import Readings
from dagger_operator.cluster.reconcile import _loaded, _understood
from dagger_operator.cluster.streams import Streams
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
    said = refused(4, _understood(status), caught.value.problems, datetime(2026, 1, 1, tzinfo=UTC))
    assert (said.reason, said.observed_generation) == ("InvalidSpec", 4)
    assert "spec.teachers" in said.conditions[0].message


def _refused(status: dict[str, Any]) -> dict[str, Any]:
    """A run with this status, whose spec is not understood any more, as it is stored then."""
    stored = {**STORED, "spec": {**STORED["spec"], "teachers": 2}, "status": status}
    with pytest.raises(InvalidRun) as caught:
        _loaded(stored)
    return {**stored, "status": refused(4, _understood(status), caught.value.problems, datetime(2026, 1, 2, tzinfo=UTC)).wire()}


def _condition(kind: str, status: str, reason: str) -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "lastTransitionTime": "2026-01-01T00:00:00Z"}


def test_a_run_that_becomes_invalid_stands_still_and_its_metric_says_why() -> None:
    known = [_condition("Accepted", "True", "Valid"), _condition("Progressing", "True", "RolloutRunning")]
    run = _refused({"phase": "Rollout", "round": 2, "reason": "RolloutRunning", "conditions": known})
    standing = {one["type"]: (one["status"], one["reason"]) for one in run["status"]["conditions"]}
    assert standing == {"Accepted": ("False", "InvalidSpec"), "Progressing": ("False", "InvalidSpec")}
    assert all("spec.teachers" in one["message"] for one in run["status"]["conditions"])
    health = Health(Streams(lambda *_: None), standstill=lambda: 0.0, look=lambda: 0.0, leads=lambda: True)
    readings = Readings(Cache(), WorkQueue(time.monotonic), health)
    (info,) = [metric for metric in readings._runs([run]) if metric.name == "dagger_run_info"]
    assert [sample.labels["reason"] for sample in info.samples] == ["InvalidSpec"], "what DaggerRunStuck goes by"


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_run_that_has_ended_says_still_how(phase: str) -> None:
    known = [
        _condition("Accepted", "True", "Valid"),
        _condition("Progressing", "False", "RoundsDone"),
        _condition(phase, "True", "RoundsDone"),
    ]
    run = _refused({"phase": phase, "round": 2, "reason": "RoundsDone", "conditions": known})
    assert {one["type"]: one["reason"] for one in run["status"]["conditions"]} == {
        "Accepted": "InvalidSpec",
        "Progressing": "RoundsDone",
        phase: "RoundsDone",
    }
