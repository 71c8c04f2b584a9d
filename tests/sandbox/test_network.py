"""Who reaches whom, on a cluster that enforces NetworkPolicies: the chart's for sandboxes, and those that a run has for its servers."""

import asyncio
import json
import re
import shlex
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import pytest
import yaml

from dagger_operator.api import load
from dagger_operator.control.names import COMPONENT, MANAGED_BY, MANAGED_BY_VALUE, RUN
from dagger_operator.control.network import build_network_policy
from dagger_operator.sandbox.interface import Sandbox, SandboxRequest
from dagger_operator.sandbox.pods import PodSandboxes
from fixtures.tools import ROOT

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

Places = Mapping[str, tuple[str, int]]
"""Addresses and ports by what is there."""
Shell = Callable[[str], Awaitable[str]]
"""Runs a command somewhere; what it prints."""
Pods = Callable[..., dict[str, str]]
LISTEN = "for port in 8000 8090 9090; do nc -ll -p $port -e echo $HOSTNAME & done; wait"
WORKER = {MANAGED_BY: MANAGED_BY_VALUE, RUN: "one", COMPONENT: "rollout"}


def reaching(places: Places) -> str:
    """A command that prints which of these places take a connection, for any shell with busybox."""
    tries = [f"(nc -w 2 {host} {port} -e true 2>/dev/null && echo {shlex.quote(place)}) &" for place, (host, port) in places.items()]
    return " ".join([*tries, "wait"])


def kubectl(cluster: Any, namespace: str, *arguments: str, input: str | None = None) -> str:
    said: str = cluster.kubectl(f"--namespace={namespace}", *arguments, input=input)
    return said


@pytest.fixture
def elsewhere(cluster: Any) -> Iterator[str]:
    """The namespace of a run."""
    with cluster.fresh_namespace() as name:
        yield name


@pytest.fixture
def start(cluster: Any) -> Pods:
    """Starts pods of one namespace that listen on a few ports; their addresses by name."""

    def call(namespace: str, **labels: Mapping[str, str]) -> dict[str, str]:
        container = {"name": "main", "image": "localhost/busybox:1", "command": ["sh", "-c", LISTEN]}
        spec = {"terminationGracePeriodSeconds": 0, "containers": [container]}
        items = [
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": dict(those)}, "spec": spec}
            for name, those in labels.items()
        ]
        kubectl(cluster, namespace, "create", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        kubectl(cluster, namespace, "wait", "--for=condition=Ready", *(f"pod/{name}" for name in labels), "--timeout=90s")
        return {name: kubectl(cluster, namespace, "get", "pod", name, "--output=jsonpath={.status.podIP}") for name in labels}

    return call


@pytest.fixture
def here(cluster: Any) -> Iterator[tuple[str, int]]:
    """A server on this machine, as object storage may be one."""
    if cluster.host is None:
        pytest.skip("pods cannot reach this machine: DAGGER_TEST_HOST says under which address they could")
    with socket.create_server((cluster.host, 0)) as server:
        yield server.getsockname()[:2]


def inside(cluster: Any, namespace: str, name: str) -> Shell:
    """A shell in a pod."""

    async def call(command: str) -> str:
        return await asyncio.to_thread(kubectl, cluster, namespace, "exec", name, "--", "sh", "-c", command)

    return call


def in_sandbox(sandbox: Sandbox) -> Shell:
    async def call(command: str) -> str:
        return (await sandbox.execute(command, timeout=60)).output

    return call


async def until(expected: set[str], shell: Shell, command: str, seconds: float = 40) -> None:
    """Until a command prints these lines: a plugin takes a moment for a new policy and for a new pod."""
    deadline = time.monotonic() + seconds
    while (found := set((await shell(command)).splitlines())) != expected:
        assert time.monotonic() < deadline, f"reached {sorted(found)} and not {sorted(expected)}"
        await asyncio.sleep(0.3)


async def test_a_sandbox_reaches_its_gateway_at_most_and_is_reached_by_workers_alone(
    pods: Callable[..., PodSandboxes],
    cluster: Any,
    namespace: str,
    elsewhere: str,
    start: Pods,
    sandbox_policies: None,
    here: tuple[str, int],
) -> None:
    there = start(elsewhere, worker=WORKER, stranger={"app": "stranger"})
    from_worker, from_stranger = (inside(cluster, elsewhere, name) for name in ("worker", "stranger"))
    async with pods() as provider:
        closed = await provider.create(SandboxRequest("closed"), timeout=120)
        scaffold = await provider.create(SandboxRequest("scaffold", network_to=f"{there['worker']}:8090"), timeout=120)
        in_closed, in_scaffold = in_sandbox(closed), in_sandbox(scaffold)
        lives = {life.pod["metadata"]["annotations"]["dagger-operator.dev/sandbox"]: life for life in provider._fleet.at_rest()}
        addresses = {name: life.state.address for name, life in lives.items()}
        nameserver = re.findall(r"nameserver (\S+)", await from_stranger("cat /etc/resolv.conf"))[0]
        service = kubectl(cluster, "default", "get", "service", "kubernetes", "--output=jsonpath={.spec.clusterIP}")
        endpoint = json.loads(kubectl(cluster, "default", "get", "endpointslice", "kubernetes", "--output=json"))
        node = kubectl(cluster, "default", "get", "nodes", "--output=jsonpath={.items[0].status.addresses[0].address}")
        outside: Places = {
            "API server": (service, 443),
            "API server's own address": (endpoint["endpoints"][0]["addresses"][0], endpoint["ports"][0]["port"]),
            "kubelet": (node, 10250),
            "DNS": (nameserver, 53),
            "this machine": here,
            "a stranger": (there["stranger"], 8090),
            "another port of the worker": (there["worker"], 9090),
            "the gateway": (there["worker"], 8090),
        }
        sandboxes: Places = {"the closed one": (addresses["closed"], 7070), "the scaffold's": (addresses["scaffold"], 7070)}
        everywhere = {**outside, **sandboxes}
        by_name = f"timeout 5 nslookup kubernetes.default.svc.cluster.local {nameserver} >/dev/null 2>&1 && echo a name; true"

        # That these places answer at all shows a pod that no policy is about.
        await until({*outside, "a name"}, from_stranger, f"{reaching(everywhere)}; {by_name}")
        # A sandbox's own address is its own.
        others = {**outside, "the scaffold's": sandboxes["the scaffold's"]}
        await until(set(), in_closed, f"{reaching(others)}; {by_name}")
        await until({"the gateway", "the scaffold's"}, in_scaffold, f"{reaching(everywhere)}; {by_name}")
        await until({"worker"}, in_scaffold, "nc -w 2 127.0.0.1 8090 </dev/null")

        # From outside: the helper's port, and for workers only. What else listens in a sandbox nobody reaches.
        listening = asyncio.create_task(closed.execute("nc -ll -p 7071 -e true", timeout=120))
        more = {**sandboxes, "a port of a command": (addresses["closed"], 7071)}
        await until({*sandboxes}, from_worker, reaching(more))
        await until(set(), from_stranger, reaching(more))
        answer = await from_worker(f"printf 'GET /files HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {addresses['closed']} 7070")
        assert "401 Unauthorized" in answer and "wrong token" in answer
        assert not listening.done()
        listening.cancel()


async def test_a_runs_servers_are_open_to_its_own_pods_and_to_prometheus_on_one_port(
    cluster: Any, namespace: str, elsewhere: str, start: Pods
) -> None:
    sample = yaml.safe_load((ROOT / "manifests" / "samples" / "paper-qwen3-4b-dagger.yaml").read_text())
    run = load({**sample, "metadata": {"name": "one", "namespace": elsewhere, "uid": "u"}})
    policy = build_network_policy(run)
    del policy["metadata"]["ownerReferences"]  # there is no run that the garbage collector would find
    kubectl(cluster, elsewhere, "create", "-f", "-", input=json.dumps(policy))
    server = start(elsewhere, student={**WORKER, COMPONENT: "student"}, worker=WORKER, stranger={"app": "stranger"})["student"]
    start(namespace, worker=WORKER, prometheus={"app.kubernetes.io/name": "prometheus"})
    command = reaching({"its agent": (server, 8000), "another port": (server, 8090)})
    for where, name, expected in (
        (elsewhere, "stranger", set()),
        (namespace, "worker", set()),
        (elsewhere, "worker", {"its agent"}),
        (namespace, "prometheus", {"its agent"}),
    ):
        await until(expected, inside(cluster, where, name), command)
