"""Runs in a queue, with the Kueue that clusters have: what is admitted runs, what is not says so, and nobody quarrels about a Job."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.heavy

KUEUE = "kueue.x-k8s.io/v1beta2"
RESOURCES = ["cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"]


def queue(namespace: str, *, gpus: int) -> list[dict[str, Any]]:
    """A queue of a namespace's own, on nodes that wear a label and a taint."""
    flavor = {"nodeLabels": {"pool": "gpu"}, "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]}
    quotas = [{"name": name, "nominalQuota": gpus if name == RESOURCES[3] else "1000Gi"} for name in RESOURCES]
    group = {"coveredResources": RESOURCES, "flavors": [{"name": namespace, "resources": quotas}]}
    return [
        {"apiVersion": KUEUE, "kind": "ResourceFlavor", "metadata": {"name": namespace}, "spec": flavor},
        {
            "apiVersion": KUEUE,
            "kind": "ClusterQueue",
            "metadata": {"name": namespace},
            "spec": {"namespaceSelector": {}, "resourceGroups": [group]},
        },
        {
            "apiVersion": KUEUE,
            "kind": "LocalQueue",
            "metadata": {"name": "gpus", "namespace": namespace},
            "spec": {"clusterQueue": namespace},
        },
    ]


@pytest.fixture
def quota(lab: Any, control_plane: Any) -> Callable[[int], None]:
    """Gives the namespace's queue so many GPUs."""

    def give(gpus: int) -> None:
        items = queue(lab.namespace, gpus=gpus)
        control_plane.kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))

    return give


IN_A_QUEUE = {"kueue": {"queueName": "gpus"}, "preRunningDeadlineSeconds": 5}
POD = {"nodeSelector": {"disk": "fast"}, "tolerations": [{"key": "own", "operator": "Exists"}]}
TRAINING = {"gpusPerNode": 4, "processesPerNode": 4, "nodes": 2}


async def _stays(lab: Any, reason: str, seconds: float = 8) -> None:
    """Longer than its deadline for what waits elsewhere; another server may wait for a moment, for the same reason, before."""
    settled = time.monotonic() + 60
    since: float | None = None
    while since is None or time.monotonic() < since + seconds:
        status = (await lab.run()).get("status", {})
        if status.get("reason") != reason:
            since = None
        elif since is None:
            since = time.monotonic()
        assert since is not None or time.monotonic() < settled, status
        await asyncio.sleep(0.5)


async def _workload(lab: Any, job: dict[str, Any]) -> dict[str, Any]:
    async def there() -> dict[str, Any] | None:
        async for one in lab.client.list(KUEUE, "Workload", lab.namespace):
            if job["metadata"]["uid"] in {owner["uid"] for owner in one["metadata"].get("ownerReferences", ())}:
                found: dict[str, Any] = one
                return found
        return None

    found: dict[str, Any] = await lab.until(there)
    return found


async def _is_free(lab: Any) -> bool:
    """Whether nobody holds a GPU of the queue."""
    found = await lab.client.get(KUEUE, "ClusterQueue", "", lab.namespace)
    (flavor,) = found["status"]["flavorsUsage"]
    return {one["name"]: one["total"] for one in flavor["resources"]}["nvidia.com/gpu"] == "0"


async def test_what_kueue_writes_into_a_job_at_work_is_left_alone(operator: Any, lab: Any, quota: Callable[[int], None]) -> None:
    """Its flavor's nodes and tolerations go into the pods beside the run's own, and a Job at work takes no other ones."""
    quota(8)
    lab.working = {"training"}
    await lab.create(**IN_A_QUEUE, training={**TRAINING, "pod": POD})
    await _stays(lab, "TrainingRunning")
    job = await lab.until_job("training")
    spec = job["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"disk": "fast", "pool": "gpu"}
    assert {one["key"] for one in spec["tolerations"]} == {"own", "gpu"}
    lab.working = set()
    await lab.until_phase("Succeeded")
    said = map(json.loads, operator.log.read_text().splitlines())
    assert not [one for one in said if one.get("namespace") == lab.namespace and one["event"] == "refused"]


async def test_a_training_that_the_queue_has_no_room_for_waits_as_a_whole_and_says_so(
    operator: Any, lab: Any, quota: Callable[[int], None]
) -> None:
    quota(4)
    await lab.create(**IN_A_QUEUE, training=TRAINING)
    await _stays(lab, "WaitingInQueue")
    pods = [one for one in await lab.objects("v1", "Pod") if one["metadata"]["labels"]["dagger-operator.dev/component"] == "training"]
    assert pods == [], "four GPUs would do for one of its two nodes"
    quota(8)
    await lab.until_phase("Succeeded")


async def test_a_server_that_the_queue_has_no_room_for_says_so(operator: Any, lab: Any, quota: Callable[[int], None]) -> None:
    quota(0)
    await lab.create(**IN_A_QUEUE, student={"model": "m", "serving": {"gpus": 1}}, training={"mode": "Disabled"})
    await _stays(lab, "SchedulingGated")
    quota(1)
    await lab.until_phase("Succeeded")


async def test_a_stage_that_the_queue_takes_its_room_from_goes_on_when_it_is_given_back(
    operator: Any, lab: Any, quota: Callable[[int], None]
) -> None:
    quota(8)
    lab.working = {"training"}
    await lab.create(**IN_A_QUEUE, training=TRAINING)
    await lab.until_reason("TrainingRunning")
    workload = await _workload(lab, await lab.until_job("training"))
    head = {"apiVersion": KUEUE, "kind": "Workload", "metadata": {"name": workload["metadata"]["name"], "namespace": lab.namespace}}
    await lab.client.patch({**head, "spec": {"active": False}})
    await _stays(lab, "WaitingInQueue")
    await lab.client.patch({**head, "spec": {"active": True}})
    await lab.until_reason("TrainingRunning")
    lab.working = set()
    await lab.until_phase("Succeeded")


async def test_a_suspended_run_gives_its_room_back(operator: Any, lab: Any, quota: Callable[[int], None]) -> None:
    quota(8)
    lab.working = {"training"}
    await lab.create(**IN_A_QUEUE, training=TRAINING)
    await lab.until_reason("TrainingRunning")
    await lab.edit(suspend=True)
    await lab.until(lambda: _is_free(lab))
    lab.working = set()
    await lab.edit(suspend=False)
    await lab.until_phase("Succeeded")


async def test_a_stage_in_a_queue_that_no_retry_mends_fails_the_run(operator: Any, lab: Any, quota: Callable[[int], None]) -> None:
    quota(8)
    lab.failing = {"training"}
    await lab.create(**IN_A_QUEUE, training=TRAINING)
    run = await lab.until_phase("Failed")
    assert run["status"]["reason"] == "TaskSourceMissing"


async def test_a_stage_in_a_queue_that_is_given_up_is_ended_and_gives_its_room_back(
    operator: Any, lab: Any, quota: Callable[[int], None]
) -> None:
    """By the plan, on a budget that the Job does not know."""
    quota(8)
    lab.failing, lab.exit_code = {"training"}, 75
    await lab.create(**IN_A_QUEUE, training={**TRAINING, "pod": POD}, failurePolicy={"infrastructureRetries": 1})
    await lab.until_phase("Failed")
    await lab.until(lambda: _is_free(lab))
    job = await lab.until_job("training")
    assert {one["type"] for one in job["status"]["conditions"]} >= {"Failed"}


async def test_a_group_of_nodes_is_admitted_as_a_whole(operator: Any, lab: Any, quota: Callable[[int], None]) -> None:
    quota(8)
    await lab.create(**IN_A_QUEUE, teacher={"model": "t", "serving": {"gpus": 8, "nodes": 2}}, training={"mode": "Disabled"})
    await _stays(lab, "SchedulingGated")
    pods = [one for one in await lab.objects("v1", "Pod") if one["metadata"]["labels"]["dagger-operator.dev/component"] == "teacher"]
    assert pods and all(one["spec"].get("schedulingGates") for one in pods), "eight GPUs would do for one of its two nodes"
    quota(16)
    await lab.until_phase("Succeeded")
