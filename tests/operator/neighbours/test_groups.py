"""Servers over several nodes, with the LeaderWorkerSet controller that clusters have: nodes find each other, and what breaks again and
again is given up."""

import asyncio
import json
import re
from typing import Any

import pytest

pytestmark = pytest.mark.heavy

GROUPS = "leaderworkerset.x-k8s.io/v1"
TEACHER = {"model": "t", "serving": {"gpus": 8, "nodes": 2, "replicas": 2}}


async def _pods(lab: Any, count: int) -> list[dict[str, Any]]:
    """The teacher's, once there are as many."""
    found: list[dict[str, Any]] = []

    async def there() -> bool:
        every = await lab.objects("v1", "Pod")
        found[:] = [one for one in every if one["metadata"]["labels"]["dagger-operator.dev/component"] == "teacher"]
        return len(found) == count

    await lab.until(there)
    return found


async def test_the_nodes_of_a_replica_find_the_first_before_it_is_ready(operator: Any, lab: Any) -> None:
    lab.paused = {"teacher"}
    await lab.create(teacher=TEACHER)
    pods = await _pods(lab, 4)
    services = {one["metadata"]["name"]: one["spec"] async for one in lab.client.list("v1", "Service", lab.namespace)}
    for pod in pods:
        (vllm,) = (one for one in pod["spec"]["containers"] if one["name"] == "vllm")
        environ = {one["name"]: one.get("value") for one in vllm["env"]}
        assert set(re.findall(r"\$\((LWS_\w+)\)", " ".join(vllm["command"]))) == {"LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"}
        assert environ["LWS_WORKER_INDEX"] == pod["metadata"]["labels"]["leaderworkerset.sigs.k8s.io/worker-index"]
        leader, service, namespace = environ["LWS_LEADER_ADDRESS"].split(".")
        assert pod["metadata"]["name"].startswith(leader) and namespace == lab.namespace
        assert services[service]["publishNotReadyAddresses"], "a name of a pod that is not ready yet"
        assert services[service]["selector"].items() <= pod["metadata"]["labels"].items()
    asked = services["demo-teacher"]
    first = [one for one in pods if asked["selector"].items() <= one["metadata"]["labels"].items()]
    assert sorted(one["metadata"]["name"] for one in first) == ["demo-teacher-group-0", "demo-teacher-group-1"]
    assert not asked.get("publishNotReadyAddresses"), "requests go to those alone that answer"
    lab.paused = set()
    await lab.until_phase("Succeeded")


async def test_a_group_at_rest_is_not_written_to(operator: Any, lab: Any) -> None:
    """What webhooks and controllers put into it does not look like a change to the operator."""
    lab.paused = {"preflight"}
    await lab.create(teacher=TEACHER)
    await lab.until_job("preflight")
    (before,) = await lab.objects(GROUPS, "LeaderWorkerSet")
    await asyncio.sleep(5)
    (after,) = await lab.objects(GROUPS, "LeaderWorkerSet")
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]


async def test_a_group_is_freed_by_suspension_and_comes_back(operator: Any, lab: Any) -> None:
    lab.paused = {"rollout"}
    await lab.create(teacher=TEACHER)
    await lab.until_job("rollout")
    await lab.edit(suspend=True)
    await _pods(lab, 0)
    await lab.edit(suspend=False)
    await _pods(lab, 4)
    lab.paused = set()
    await lab.until_phase("Succeeded")


async def test_nodes_that_are_begun_anew_again_and_again_are_given_up_with_the_words_of_the_last(operator: Any, lab: Any) -> None:
    lab.paused = {"teacher"}
    await lab.create(teacher={"model": "t", "serving": {"gpus": 8, "nodes": 2}})
    starts: set[str] = set()

    async def crashes() -> bool:
        """A container of the second node ends in each start; whether the run has failed."""
        for one in await lab.objects("v1", "Pod"):
            uid, name = one["metadata"]["uid"], one["metadata"]["name"]
            if name == "demo-teacher-group-0-1" and uid not in starts and len(starts) < 10:
                starts.add(uid)
                ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": "CUDA out of memory"}}
                vllm = {"name": "vllm", "image": "i", "imageID": "", "restartCount": 1, "ready": False, "state": {}, "lastState": ended}
                await lab._set(one, {"phase": "Running", "containerStatuses": [vllm]})
        run = await lab.run()
        return bool((run.get("status") or {}).get("phase") == "Failed")

    await lab.until(crashes)
    status = (await lab.run())["status"]
    assert (status["reason"], 6 <= len(starts) <= 10) == ("GroupBegunAnew", True), json.dumps(status)
    (failed,) = (one for one in status["conditions"] if one["type"] == "Failed")
    assert "demo-teacher-group-0-1 failed" in failed["message"]
    await _pods(lab, 0)
