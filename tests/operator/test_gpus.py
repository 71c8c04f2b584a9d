"""Who holds GPUs for what, as `docs/metrics.md` says."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from structlog.testing import capture_logs

from dagger_operator.cluster import metrics
from dagger_operator.cluster.cache import Cache
from dagger_operator.cluster.gpus import held
from dagger_operator.cluster.metrics import Metrics

Json = dict[str, Any]


def pod(component: str, *, gpus: int | str = 1, ready: bool = True, phase: str = "Running", bound: bool = True, run: str = "demo") -> Json:
    return {
        "kind": "Pod",
        "metadata": {
            "name": f"{run}-{component}",
            "namespace": "lab",
            "labels": {"dagger-operator.dev/run": run, "dagger-operator.dev/component": component},
        },
        "spec": {
            **({"nodeName": "node-1"} if bound else {}),
            "containers": [{"name": "main", "resources": {"limits": {"nvidia.com/gpu": str(gpus), "cpu": "8"}}}] if gpus else [],
        },
        "status": {"phase": phase, "conditions": [{"type": "Ready", "status": str(ready)}]},
    }


def test_servers_that_are_asked_are_at_work_and_others_are_idle() -> None:
    servers = [pod("student", gpus=2), pod("teacher", gpus=4)]
    assert held(servers) == {"idle": 6}
    assert held([*servers, pod("rollout", gpus=0)]) == {"student": 2, "teacher": 4}
    assert held([*servers, pod("evaluation", gpus=0)]) == {"student": 2, "idle": 4}
    assert held([*servers, pod("rollout", gpus=0, phase="Succeeded")]) == {"idle": 6}
    assert held([*servers, pod("rollout", gpus=0, run="other")]) == {"idle": 6}


def test_a_server_that_is_not_ready_is_starting_whoever_waits_for_it() -> None:
    assert held([pod("student", ready=False), pod("rollout", gpus=0)]) == {"starting": 1}


def test_a_gpu_is_held_from_the_node_to_the_end() -> None:
    assert held([pod("training", gpus=8)]) == {"training": 8}
    assert held([pod("training", gpus=8, bound=False)]) == {}
    assert held([pod("training", gpus=8, phase="Failed")]) == {}


@pytest.mark.parametrize(("written", "gpus"), [("8", 8), ("1k", 1000), ("2e3", 2000), ("4000m", 4)])
def test_a_number_of_gpus_is_understood_in_every_way_in_which_the_api_server_writes_it(written: str, gpus: int) -> None:
    """It makes 1k of 1000, so a pod may state it whatever its author wrote."""
    assert held([pod("training", gpus=written)]) == {"training": gpus}


@pytest.mark.parametrize("written", ["many", "NaN", "Infinity", "1e999999999"])
def test_what_is_no_number_of_gpus_counts_as_none_and_is_logged_once(written: str) -> None:
    with capture_logs() as logs:
        for _ in range(3):
            assert held([pod("training", gpus=written), pod("student", gpus=2)]) == {"idle": 2}
    assert len(logs) == 1


async def test_pods_that_cannot_be_counted_end_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def broken_at_first(pods: Iterable[Json]) -> Counter[str]:
        nonlocal looks
        looks += 1
        if looks < 3:
            raise ValueError("a pod like none before")
        return Counter(idle=1)

    monkeypatch.setattr(metrics, "_GPU_SECONDS", 0.001)
    monkeypatch.setattr(metrics, "held", broken_at_first)
    one = Metrics()
    counting = asyncio.create_task(one.count_gpus(Cache()))
    async with asyncio.timeout(10):
        while not counting.done() and not one.registry.get_sample_value("dagger_gpu_seconds_total", {"use": "idle"}):
            await asyncio.sleep(0.001)
    assert not counting.done()
    counting.cancel()


def test_the_end_of_a_job_that_states_no_time_is_not_measured() -> None:
    one, labels = Metrics(), {"dagger-operator.dev/component": "rollout"}
    job: Json = {"kind": "Job", "metadata": {"labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"}}
    for times in ({}, {"lastTransitionTime": None}, {"lastTransitionTime": "2026-01-01T00:01:00Z"}):
        one.heard(job, {**job, "status": {"conditions": [{"type": "Complete", "status": "True", **times}]}})
    assert one.registry.get_sample_value("dagger_stage_seconds_count", {"stage": "rollout", "outcome": "Succeeded"}) == 1
