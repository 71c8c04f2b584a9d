"""Measures sandbox pods: a command's overhead over its own process, for each way to send it, and the time to a sandbox's first command.

    python benchmarks/sandboxes.py --image IMAGE --helper IMAGE [--namespace NAMESPACE] [--commands 50] [--sandboxes 1,8,32] [--blocks 3]
        [--cpus 0.1]

Needs KUBECONFIG, kubectl, and two images on the nodes: one with bash for the sandboxes, and the project's `sandbox-helper`.
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
from dataclasses import dataclass

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.interface import SandboxRequest
from dagger_operator.sandbox.kube import Kind, Kube
from dagger_operator.sandbox.pod_manifest import CONTAINER, Setting
from dagger_operator.sandbox.pod_sandbox import PodSandbox
from dagger_operator.sandbox.pods import PodSandboxes


def setting(given: argparse.Namespace) -> Setting:
    limits = SandboxLimits(cpus=given.cpus, memory_mib=64, disk_mib=64)
    return Setting("bench", "bench", "worker-0", secrets.token_hex(4), given.helper, limits, 900, given.image)


async def timed(work: Awaitable[object]) -> float:
    """Return the duration in milliseconds."""
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1000


async def commands(provider: PodSandboxes, namespace: str, count: int) -> None:
    """Run `true` in one sandbox in each way, interleaved."""
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


@dataclass(frozen=True)
class Start:
    """Milliseconds for each of several sandboxes, or bare pods, that were requested at once."""

    first: list[float]
    commands: list[float]
    """Duration of a command while all sandboxes run commands."""


async def sandboxes(provider: PodSandboxes, kube: Kube, many: int) -> Start:
    """Measure from the request to the end of the first command."""
    created: list[PodSandbox] = []

    async def begin(number: int) -> None:
        made = await provider.create(SandboxRequest(f"first-{many}-{number}"), timeout=300)
        created.append(made)
        await made.execute("true", timeout=60)

    first = await asyncio.gather(*(timed(begin(number)) for number in range(many)))
    together = [value for values in await asyncio.gather(*(repeated(one) for one in created)) for value in values]
    await asyncio.gather(*(one.close() for one in created))
    await gone(kube, "app.kubernetes.io/component=sandbox")
    return Start(first, together)


async def bare_pods(kube: Kube, image: str, cpus: float, many: int) -> Start:
    """Measure from the request until the API server reports `Running`, seen through one watch."""
    running = {f"bare-{many}-{number}": asyncio.Event() for number in range(many)}

    async def watch() -> None:
        _, version = await kube.list(Kind.PODS, "bench=bare")
        async for _, pod in kube.watch(Kind.PODS, "bench=bare", version):
            if (pod.get("status") or {}).get("phase") == "Running":
                running[pod["metadata"]["name"]].set()

    async def begin(name: str) -> None:
        resources = {"requests": {"cpu": f"{cpus / 4}", "memory": "16Mi"}, "limits": {"cpu": f"{cpus}", "memory": "128Mi"}}
        container = {"name": "bare", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["sleep", "600"], "resources": resources}
        spec = {"containers": [container], "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": False}
        await kube.create(
            Kind.PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"bench": "bare"}}, "spec": spec}
        )
        await running[name].wait()

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.5)
    first = await asyncio.gather(*(timed(begin(name)) for name in running))
    watching.cancel()
    for pod in (await kube.list(Kind.PODS, "bench=bare"))[0]:
        await kube.delete(Kind.PODS, pod)
    await gone(kube, "bench=bare")
    return Start(first, [])


async def first_commands(provider: PodSandboxes, kube: Kube, given: argparse.Namespace, many: int) -> None:
    """Alternate blocks of sandboxes and of bare pods; the row has medians over blocks of each block's median and last time."""
    ours, theirs = [], []
    for _ in range(given.blocks):
        ours.append(await sandboxes(provider, kube, many))
        theirs.append(await bare_pods(kube, given.image, given.cpus, many))

    def seconds(starts: list[Start], of: Callable[[list[float]], float]) -> float:
        return statistics.median(of(start.first) for start in starts) / 1000

    first, alone = seconds(ours, statistics.median), seconds(theirs, statistics.median)
    over = statistics.median(
        (statistics.median(one.first) - statistics.median(other.first)) / 1000 for one, other in zip(ours, theirs, strict=True)
    )
    together = [value for start in ours for value in start.commands]
    print(
        f"| {many} | {first:.1f} | {seconds(ours, max):.1f} | {alone:.1f} | {seconds(theirs, max):.1f} | {over:.1f} | "
        f"{statistics.median(together):.1f} | {statistics.quantiles(together, n=20)[-1]:.1f} |",
        flush=True,
    )


async def repeated(sandbox: PodSandbox) -> list[float]:
    return [await timed(sandbox.execute("true", timeout=120)) for _ in range(10)]


async def gone(kube: Kube, selector: str) -> None:
    while (await kube.list(Kind.PODS, selector))[0]:  # noqa: ASYNC110 - outside of what is timed
        await asyncio.sleep(0.3)


async def measure(given: argparse.Namespace) -> None:
    async with (
        Kube.connect(given.namespace) as kube,
        PodSandboxes(setting(given), given.namespace, most_alive=64) as provider,
    ):
        print(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()}))
        if given.commands:
            await commands(provider, given.namespace, given.commands)
        columns = (
            "sandboxes at once",
            "first command: median s",
            "last s",
            "bare pod Running: median s",
            "last s",
            "over a bare pod s",
            "command p50 ms",
            "p95 ms",
        )
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for many in map(int, given.sandboxes.split(",")):
            await first_commands(provider, kube, given, many)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True, help="of sandboxes and bare pods")
    parser.add_argument("--helper", required=True, help="brings the helper to sandboxes")
    parser.add_argument("--namespace", default="sandbox-benchmark")
    parser.add_argument("--commands", type=int, default=50)
    parser.add_argument("--sandboxes", default="1,8,32")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--cpus", type=float, default=0.1, help="processor limit of sandboxes and of bare pods")
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
