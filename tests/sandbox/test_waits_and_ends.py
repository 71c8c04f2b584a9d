"""Sandbox pods on an API server of the test's own: what their creation waits for, and what their end is taken for."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from aiohttp import web
from structlog.testing import capture_logs

from dagger_operator.api import SandboxLimits, load
from dagger_operator.rollout.sandboxes import sandboxes
from dagger_operator.sandbox import pods
from dagger_operator.sandbox.helper_line import Network
from dagger_operator.sandbox.interface import LimitExceeded, SandboxError, SandboxRequest
from dagger_operator.sandbox.pod_fleet import PodFleet
from dagger_operator.sandbox.pod_manifest import Setting
from dagger_operator.sandbox.pods import PodSandboxes
from dagger_operator.sandbox.worker_lease import WorkerLease
from dagger_operator.store.stage import StageFailure
from fixtures.api_server import ApiServer, refusal

QUOTA = 'pods "one" is forbidden: exceeded quota: sandboxes, requested: pods=1, used: pods=4, limited: pods=4'
SETTING = Setting("r", "team", "rollout-0", "0a1b2c3d", "helper:1", SandboxLimits(), 900, "task:1")
CONTENTION = 'Operation cannot be fulfilled on resourcequotas "sandboxes": the object has been modified'


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiServer]:
    async with ApiServer.running() as (server, kube):
        named = {"name": "test", "cluster": {"server": kube._api._settings.host}, "context": {"cluster": "test", "user": ""}}
        config = {"clusters": [named], "contexts": [named], "users": [{"name": ""}], "current-context": "test"}
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield server


@pytest.fixture
async def provider(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PodSandboxes]:
    """Its pods have a helper that takes all files, and whose commands never end."""

    async def helper(request: web.Request) -> web.Response:
        await asyncio.sleep(60 if request.path.startswith("/commands") else 0)
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", helper)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    monkeypatch.setattr(pods, "HELPER_PORT", port)
    monkeypatch.setattr(pods, "Network", partial(Network, port=port))
    async with PodSandboxes(SETTING, "sandboxes", most_alive=2) as provider:
        yield provider
    await runner.cleanup()


async def begun(server: ApiServer, name: str = "one") -> str:
    """Plays kubelet: starts the pod, and returns its name."""
    async with asyncio.timeout(10):
        while not (found := [one["metadata"]["name"] for one in server.there("pods") if one["metadata"]["name"].startswith(f"{name}-")]):
            await asyncio.sleep(0.01)
    running = {"name": "sandbox", "state": {"running": {}}}
    await server.change("pods", found[0], status={"phase": "Running", "podIP": "127.0.0.1", "containerStatuses": [running]})
    return str(found[0])


def refusing(*refused: web.Response | None, then: Callable[[], web.Response] | None = None) -> Callable[[web.Request], Any]:
    """Answers to the first creations of pods, and to all further ones."""
    left = list(refused)

    def answer(request: web.Request) -> web.Response | None:
        if request.method != "POST" or not request.path.endswith("/pods"):
            return None
        return left.pop(0) if left else then() if then else None

    return answer


async def test_a_pod_that_a_quota_has_no_room_for_yet_is_waited_for(server: ApiServer, provider: PodSandboxes) -> None:
    server.fault = refusing(refusal(403, "Forbidden", QUOTA), refusal(409, "Conflict", CONTENTION), refusal(403, "Forbidden", QUOTA))
    creating = asyncio.create_task(provider.create(SandboxRequest("one"), timeout=20))
    await begun(server)
    await creating


async def test_a_grades_sandbox_comes_once_the_agents_pod_has_left_the_quota(server: ApiServer, provider: PodSandboxes) -> None:
    creating = asyncio.create_task(provider.create(SandboxRequest("agent"), timeout=20))
    agents = await begun(server, "agent")
    sandbox = await creating

    def one_pod_at_a_time(request: web.Request) -> web.Response | None:
        if request.method == "DELETE" and request.path.endswith(agents):
            return web.json_response({})  # it goes when its kubelet says so
        full = request.method == "POST" and request.path.endswith("/pods") and server.there("pods")
        return refusal(403, "Forbidden", QUOTA) if full else None

    server.fault = one_pod_at_a_time
    await sandbox.close()
    creating = asyncio.create_task(provider.create(SandboxRequest("grade"), timeout=20))
    await asyncio.sleep(0.5)
    assert not creating.done()
    await server.remove("pods", agents)
    await begun(server, "grade")
    await creating


async def test_a_quota_that_stays_full_is_named_when_the_time_is_up(server: ApiServer, provider: PodSandboxes) -> None:
    server.fault = refusing(then=lambda: refusal(403, "Forbidden", QUOTA))
    with pytest.raises(SandboxError, match=r"^QuotaExceeded: .*not ready after 0.5 s.*exceeded quota: sandboxes, requested: pods=1"):
        await provider.create(SandboxRequest("one"), timeout=0.5)


async def test_a_worker_that_has_as_many_pods_as_it_may_says_so(server: ApiServer, provider: PodSandboxes) -> None:
    creating = [asyncio.create_task(provider.create(SandboxRequest(name), timeout=20)) for name in ("one", "two")]
    await asyncio.gather(begun(server, "one"), begun(server, "two"), *creating)
    with pytest.raises(SandboxError, match=r"^CreateTimeout: .*no room for it among 2 pods of this worker"):
        await provider.create(SandboxRequest("three"), timeout=0.2)


async def test_the_nodes_are_named_on_which_its_pods_have_yet_to_end(server: ApiServer, provider: PodSandboxes) -> None:
    creating = [asyncio.create_task(provider.create(SandboxRequest(name), timeout=20)) for name in ("one", "two")]
    names = await asyncio.gather(begun(server, "one"), begun(server, "two"))
    await asyncio.gather(*creating)
    (first,) = (one for one in server.there("pods") if one["metadata"]["name"] == names[0])
    going = {**first["metadata"], "deletionTimestamp": datetime.now(UTC).isoformat()}
    await server.change("pods", names[0], metadata=going, spec={"nodeName": "node-7"})
    with pytest.raises(SandboxError, match=r"^CreateTimeout: .*no room for it among 2 pods of this worker, .* on node-7;"):
        await provider.create(SandboxRequest("three"), timeout=1)


@pytest.mark.parametrize(
    ("code", "reason", "message"),
    [
        (403, "Forbidden", 'pods "one" is forbidden: violates PodSecurity "restricted:latest"'),
        (422, "Invalid", "spec.containers[0].image: Required value"),
    ],
)
async def test_what_will_not_pass_is_not_waited_for(
    server: ApiServer, provider: PodSandboxes, code: int, reason: str, message: str
) -> None:
    server.fault = refusing(refusal(code, reason, message))
    with pytest.raises(SandboxError, match=f"^{reason}: "):
        await asyncio.wait_for(provider.create(SandboxRequest("one"), timeout=60), 5)


FULL = "Pod ephemeral local storage usage exceeds the total limit of containers 10304Mi. "
PRESSURE = "The node was low on resource: ephemeral-storage. "


@pytest.mark.parametrize(("message", "kind"), [(FULL, LimitExceeded), (PRESSURE, SandboxError)])
async def test_who_filled_a_pods_disk_is_told_from_the_message_that_evicts_it(
    server: ApiServer, provider: PodSandboxes, message: str, kind: type[SandboxError]
) -> None:
    creating = asyncio.create_task(provider.create(SandboxRequest("one"), timeout=20))
    name = await begun(server)
    sandbox = await creating
    running = asyncio.create_task(sandbox.execute("cat /dev/zero > full", timeout=60))
    await asyncio.sleep(0.1)
    await server.change("pods", name, status={"phase": "Failed", "reason": "Evicted", "message": message})
    for lost in (running, sandbox.execute("git diff", timeout=60), sandbox.read("f")):
        with pytest.raises(SandboxError, match=message) as caught:
            await asyncio.wait_for(lost, 10)
        assert type(caught.value) is kind


UPKEEP = [(WorkerLease, "keep"), (PodFleet, "follow"), (PodFleet, "sweep")]


@pytest.mark.parametrize(("whose", "work"), UPKEEP, ids=lambda one: one if isinstance(one, str) else one.__name__)
async def test_an_upkeep_of_sandboxes_that_fails_unforeseen_ends_the_stage_as_infrastructure_and_says_why(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, whose: type, work: str
) -> None:
    async def breaks(_: Any) -> None:
        await asyncio.sleep(0.1)
        raise ValueError("not JSON")

    monkeypatch.setattr(whose, work, breaks)
    source = {"source": {"type": "JSONL", "uri": "t"}}
    teacher = {"model": "t", "endpoint": {"url": "https://t/v1"}}
    spec = {"student": {"model": "m"}, "teacher": teacher, "tasks": {**source, "heldOut": source}, "storage": {"url": "s3://bucket/run"}}
    run = load({"metadata": {"name": "demo"}, "spec": spec})
    environ = {"DAGGER_SANDBOX_NAMESPACE": "sandboxes", "DAGGER_HELPER_IMAGE": "helper:1"}
    stage: Any = SimpleNamespace(run=run, environ=environ, worker="rollout-0")
    with capture_logs() as logs, pytest.raises(StageFailure, match="ValueError: not JSON") as failed:
        async with sandboxes(stage) as provider:
            creating = asyncio.create_task(provider.create(SandboxRequest("one", image="task:1"), timeout=60))
            await asyncio.wait_for(asyncio.shield(creating), 30)
    assert not failed.value.permanent, "exit code 75: the next life may fare better"
    assert any("broke" in one["event"] and one["exc_info"] for one in logs)
    assert not server.there("leases")
    creating.cancel()
    await asyncio.gather(creating, return_exceptions=True)
