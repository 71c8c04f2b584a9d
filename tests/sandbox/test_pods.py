"""Sandboxes as pods on a real cluster: their way to readiness, their ends, and what stays when nobody is left to clean up."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from dagger_operator.api import SandboxLimits, SandboxPod
from dagger_operator.sandbox import pod_fleet
from dagger_operator.sandbox.interface import SandboxError, SandboxRequest
from dagger_operator.sandbox.pod_manifest import pod
from dagger_operator.sandbox.pods import PodSandboxes

pytestmark = pytest.mark.heavy
Make = Callable[..., PodSandboxes]


def names(cluster: Any, namespace: str, kind: str = "pods") -> list[str]:
    found: str = cluster.kubectl("get", kind, f"--namespace={namespace}", "--output=name", "--selector=app.kubernetes.io/component=sandbox")
    return found.split()


async def none_left(cluster: Any, namespace: str, kind: str = "pods", within: float = 90) -> bool:
    deadline = time.monotonic() + within
    while names(cluster, namespace, kind) and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    return not names(cluster, namespace, kind)


async def test_a_command_sees_no_rights_no_secret_and_no_service(pods: Make) -> None:
    async with pods() as provider:
        sandbox = await provider.create(SandboxRequest("closed"), timeout=120)
        result = await sandbox.execute(
            "grep -E '^Cap(Eff|Prm|Bnd)|^NoNewPrivs|^Seccomp:' /proc/self/status | cut -f2 | sort -u", timeout=60
        )
        assert result.output.split() == ["0000000000000000", "1", "2"]
        result = await sandbox.execute("cat /proc/1/environ; cat /proc/1/mem; ls /var/run/secrets; touch /dagger/x; env", timeout=60)
        assert "DAGGER_TOKEN" not in result.output and "KUBERNETES" not in result.output and "IMAGE" not in result.output
        assert result.output.count("denied") == 2 and "Read-only" in result.output
        # The helper drops what would end it.
        for signal in ("TERM", "INT", "QUIT", "SEGV", "KILL"):
            await sandbox.execute(f"kill -{signal} 1", timeout=60)
        assert (await sandbox.execute("echo alive", timeout=60)).output == "alive\n"


async def test_leaving_the_provider_leaves_nothing(pods: Make, cluster: Any, namespace: str) -> None:
    async with pods() as provider:
        await asyncio.gather(*(provider.create(SandboxRequest(f"n{number}"), timeout=120) for number in range(3)))
        assert len(names(cluster, namespace)) == 3
    assert await none_left(cluster, namespace) and await none_left(cluster, namespace, "leases")


@pytest.mark.parametrize("closed", [False, True], ids=["network", "exec"])
async def test_a_command_runs_once_whichever_way_it_is_sent_and_however_often(pods: Make, closed: bool) -> None:
    async with pods() as provider:
        if closed:
            provider._routes.found_closed("the test says so")
        sandbox = await provider.create(SandboxRequest("once", files={"large": "x" * 3_000_000}), timeout=120)
        assert len(await sandbox.read("large", limit=1 << 24) or b"") == 3_000_000
        result = await sandbox.execute("echo once >> log; sleep 1; cat log", timeout=60)
        assert (result.output, result.returncode) == ("once\n", 0)


async def test_where_the_network_is_closed_commands_go_through_exec_which_is_said_once(pods: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a network policy does it: packets to the helper's port vanish.
    async with pods() as provider:
        make, blackhole = provider._sandbox, "127.254.254.254"
        monkeypatch.setattr(provider, "_sandbox", lambda request, life, token, address: make(request, life, token, blackhole))
        with capture_logs() as logs:
            for number in range(2):
                sandbox = await provider.create(SandboxRequest(f"n{number}"), timeout=120)
                assert (await sandbox.execute("echo here", timeout=60)).output == "here\n"
        assert [entry["event"] for entry in logs if "exec" in entry["event"]] == [logs[0]["event"]]


async def test_a_pod_that_does_not_come_says_why_in_its_own_words(pods: Make) -> None:
    async with pods(limits=SandboxLimits(cpus=256)) as greedy:
        with pytest.raises(SandboxError, match=r"Unschedulable: .*Insufficient cpu"):
            await greedy.create(SandboxRequest("greedy"), timeout=5)
    async with pods() as provider:
        with pytest.raises(SandboxError, match="InvalidImageName"):
            await provider.create(SandboxRequest("bad", image="No Image"), timeout=60)
        with pytest.raises(SandboxError, match=r"(ErrImagePull|ImagePullBackOff|CreateTimeout).*localhost/none"):
            await provider.create(SandboxRequest("missing", image="localhost/none:1"), timeout=20)


async def test_sandboxes_are_of_the_runtime_class_that_is_asked_for(pods: Make, cluster: Any, namespace: str) -> None:
    """Of the node's own handler: gVisor's wants more rights than this machine gives (tests/cluster/README.md)."""
    runtime = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": namespace}, "handler": "runc"}
    async with pods(pod=SandboxPod(runtime_class_name=namespace)) as provider:
        with pytest.raises(SandboxError, match=f'RuntimeClass "{namespace}" not found'):
            await provider.create(SandboxRequest("early"), timeout=60)
        cluster.kubectl("apply", "--filename=-", input=json.dumps(runtime))
        try:
            sandbox = await provider.create(SandboxRequest("one"), timeout=120)
            assert (await sandbox.execute("echo held", timeout=60)).output == "held\n"
            (name,) = names(cluster, namespace)
            path = "jsonpath={.spec.runtimeClassName}"
            assert cluster.kubectl(f"--namespace={namespace}", "get", name, f"--output={path}") == namespace
        finally:
            cluster.kubectl("delete", "runtimeclass", namespace)


async def test_a_namespace_that_is_not_there_is_named(pods: Make, namespace: str) -> None:
    provider = pods()
    provider._namespace = "nowhere-at-all"
    with pytest.raises(SandboxError, match=r"NotFound.*nowhere-at-all"):
        await provider.__aenter__()


async def test_a_pod_deleted_under_a_command_is_an_infrastructure_failure_at_once(pods: Make, cluster: Any, namespace: str) -> None:
    async with pods() as provider:
        sandbox = await provider.create(SandboxRequest("victim"), timeout=120)
        running = asyncio.create_task(sandbox.execute("sleep 600", timeout=600))
        await asyncio.sleep(1)
        cluster.kubectl("delete", "pods", "--all", f"--namespace={namespace}", "--wait=false")
        with pytest.raises(SandboxError, match="PodDeleted"):
            await asyncio.wait_for(running, 30)


async def test_a_pod_of_an_earlier_life_makes_way_and_a_strangers_does_not(pods: Make, cluster: Any, namespace: str) -> None:
    request = SandboxRequest("same", files={"f": "x"})
    async with pods() as first:
        old = await first.create(request, timeout=120)
        async with pods() as second:
            new = await second.create(request, timeout=120)
            with pytest.raises(SandboxError, match="PodDeleted"):
                await old.execute("true", timeout=60)
            assert await new.read("f") == b"x"
            cluster.kubectl("label", "pods", "--all", "dagger-operator.dev/run=another", "--overwrite", f"--namespace={namespace}")
            with pytest.raises(SandboxError, match=r"NameTaken.*is not this run's"):
                await second.create(request, timeout=60)
            cluster.kubectl("delete", "pods", "--all", f"--namespace={namespace}", "--wait=false")


async def test_a_pod_made_by_hand_that_wears_our_labels_is_left_alone(
    pods: Make, cluster: Any, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_fleet, "_SWEEP_SECONDS", 0.2)
    async with pods(most_alive=1) as provider:
        made = pod(provider._setting, SandboxRequest("by hand"), digest="d" * 64, owner=provider._lease.manifest)
        del made["metadata"]["ownerReferences"]
        cluster.kubectl("create", "-f", "-", f"--namespace={namespace}", input=json.dumps(made))
        sandbox = await provider.create(SandboxRequest("ours"), timeout=120)  # there is room for one: it does not count
        await sandbox.close()
        with pytest.raises(SandboxError, match=r"NameTaken.*is not this run's"):
            await provider.create(SandboxRequest("by hand"), timeout=60)
        await asyncio.sleep(2)
    name = made["metadata"]["name"]
    assert not cluster.kubectl("get", "pod", name, f"--namespace={namespace}", "--output=jsonpath={.metadata.deletionTimestamp}")


async def test_no_more_pods_than_allowed_exist_at_once(pods: Make, cluster: Any, namespace: str) -> None:
    most = 0

    async def use(number: int) -> None:
        nonlocal most
        sandbox = await provider.create(SandboxRequest(f"n{number}"), timeout=240)
        most = max(most, len(names(cluster, namespace)))
        await sandbox.close()

    async with pods(most_alive=2) as provider:
        await asyncio.gather(*(use(number) for number in range(5)))
    assert 1 <= most <= 2


async def test_a_creation_that_is_cancelled_leaves_no_pod(pods: Make, cluster: Any, namespace: str) -> None:
    async with pods() as provider:
        for delay in (0.0, 0.01, 0.05, 0.3):
            task = asyncio.create_task(provider.create(SandboxRequest(f"n{delay}"), timeout=120))
            await asyncio.sleep(delay)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert await none_left(cluster, namespace)
