"""Sandbox pods: what a command costs beyond its own process, by each way to send it, and how long a sandbox takes to its first command.

    python benchmarks/sandboxes.py --image IMAGE [--namespace NAMESPACE] [--commands 50] [--sandboxes 1,8,32]

Needs KUBECONFIG, kubectl, and an image on the nodes that holds bash and `/opt/dagger/sandboxd` (it is sandbox and helper in one).
"""

import argparse
import asyncio
import json
import os
import secrets
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.interface import SandboxRequest
from dagger_operator.sandbox.kube import Kind, Kube
from dagger_operator.sandbox.pod_manifest import CONTAINER, Setting
from dagger_operator.sandbox.pod_sandbox import PodSandbox
from dagger_operator.sandbox.pods import PodSandboxes

LIMITS = SandboxLimits(cpus=0.1, memory_mib=64, disk_mib=64)


def setting(image: str) -> Setting:
    return Setting("bench", "bench", "worker-0", secrets.token_hex(4), image, LIMITS, 900, image)


async def timed(work: Awaitable[object]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1000


async def commands(provider: PodSandboxes, namespace: str, count: int) -> None:
    """One sandbox, `true` by each way, interleaved."""
    sandbox = await provider.create(SandboxRequest("commands"), timeout=300)
    (life,) = provider._fleet.at_rest()
    pod, (network, through_exec) = life.pod["metadata"]["name"], sandbox._line._ways
    inside: list[float] = []

    async def by(way: object) -> None:
        sandbox._line._ways = (way, way)  # type: ignore[assignment]  # the benchmark picks the way itself
        inside.append((await sandbox.execute("true", timeout=60)).seconds * 1000)

    async def fresh_exec() -> None:
        async with provider._kube.exec(pod, CONTAINER, "/bin/bash", "-c", "true") as socket:
            async for _ in socket:
                pass

    async def kubectl() -> None:
        process = await asyncio.create_subprocess_exec(
            "kubectl", "exec", pod, f"--namespace={namespace}", "--container", CONTAINER, "--", "bash", "-c", "true"
        )
        assert await process.wait() == 0

    ways: dict[str, Callable[[], Awaitable[None]]] = {
        "helper, pod network": lambda: by(network),
        "helper, one exec kept open": lambda: by(through_exec),
        "exec of the command (websocket)": fresh_exec,
        "`kubectl exec`": kubectl,
    }
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(count):
        for name, way in ways.items():
            measured[name].append(await timed(way()))
    floor = statistics.median(inside)
    print(f"\nfloor (start to end of `bash -c true`, measured inside): median {floor:.1f} ms\n")
    print("| way | p50 ms | p95 ms | p50 over the floor ms |\n|---|---|---|---|")
    for name, values in measured.items():
        p95 = statistics.quantiles(values, n=20)[-1]
        print(f"| {name} | {statistics.median(values):.1f} | {p95:.1f} | {statistics.median(values) - floor:.1f} |")
    await sandbox.close()


async def first_command(provider: PodSandboxes, kube: Kube, image: str, many: int) -> None:
    """`many` sandboxes at once until their first command, then as many bare pods until they run."""
    created: list[PodSandbox] = []

    async def sandbox(number: int) -> None:
        made = await provider.create(SandboxRequest(f"first-{many}-{number}"), timeout=300)
        created.append(made)
        await made.execute("true", timeout=60)

    async def bare(number: int) -> None:
        resources = {"requests": {"cpu": "25m", "memory": "16Mi"}, "limits": {"cpu": "100m", "memory": "128Mi"}}
        container = {"name": "bare", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["sleep", "600"], "resources": resources}
        spec = {"containers": [container], "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": False}
        metadata = {"name": f"bare-{many}-{number}", "labels": {"bench": "bare"}}
        await kube.create(Kind.PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        while (await kube.get(Kind.PODS, metadata["name"]))["status"]["phase"] != "Running":  # noqa: ASYNC110 - what users do
            await asyncio.sleep(0.1)

    ours = await asyncio.gather(*(timed(sandbox(number)) for number in range(many)))
    # All of them at work: what a command costs then.
    together = [value for values in await asyncio.gather(*(repeated(one) for one in created)) for value in values]
    await asyncio.gather(*(one.close() for one in created))
    await gone(kube, "app.kubernetes.io/component=sandbox")
    theirs = await asyncio.gather(*(timed(bare(number)) for number in range(many)))
    for pod in (await kube.list(Kind.PODS, "bench=bare"))[0]:
        await kube.delete(Kind.PODS, pod)
    await gone(kube, "bench=bare")
    first, alone = (statistics.median(values) / 1000 for values in (ours, theirs))
    print(
        f"| {many} | {first:.1f} | {max(ours) / 1000:.1f} | {alone:.1f} | {max(theirs) / 1000:.1f} | "
        f"{statistics.median(together):.1f} | {statistics.quantiles(together, n=20)[-1]:.1f} |"
    )


async def repeated(sandbox: PodSandbox) -> list[float]:
    return [await timed(sandbox.execute("true", timeout=120)) for _ in range(10)]


async def gone(kube: Kube, selector: str) -> None:
    while (await kube.list(Kind.PODS, selector))[0]:  # noqa: ASYNC110 - outside of what is timed
        await asyncio.sleep(0.3)


async def measure(given: argparse.Namespace) -> None:
    async with Kube.connect(given.namespace) as kube, PodSandboxes(setting(given.image), given.namespace, most_alive=64) as provider:
        print(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()}))
        await commands(provider, given.namespace, given.commands)
        columns = (
            "sandboxes at once",
            "first command: median s",
            "last s",
            "bare pod Running: median s",
            "last s",
            "command p50 ms",
            "p95 ms",
        )
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for many in map(int, given.sandboxes.split(",")):
            await first_command(provider, kube, given.image, many)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True)
    parser.add_argument("--namespace", default="sandbox-benchmark")
    parser.add_argument("--commands", type=int, default=50)
    parser.add_argument("--sandboxes", default="1,8,32")
    given = parser.parse_args()
    place = f"--namespace={given.namespace}"
    subprocess.run(["kubectl", "create", "namespace", given.namespace], check=True)
    try:
        subprocess.run(["kubectl", "wait", "--for=create", "serviceaccount/default", place, "--timeout=60s"], check=True)
        asyncio.run(measure(given))
    finally:
        subprocess.run(["kubectl", "delete", "namespace", given.namespace, "--wait=false"], check=True)


if __name__ == "__main__":
    main()
