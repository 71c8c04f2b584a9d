"""Workers killed at random moments while they make and use sandbox pods: nothing of theirs stays."""

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from dagger_operator.sandbox.interface import SandboxRequest
from dagger_operator.sandbox.pods import PodSandboxes

pytestmark = pytest.mark.heavy
LEASE_SECONDS = 6

WORKER = """
import asyncio, itertools, os, sys
from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.interface import SandboxRequest
from dagger_operator.sandbox.pod_manifest import Setting
from dagger_operator.sandbox.pods import PodSandboxes

worker, namespace, image, lease = sys.argv[1:]

async def slot(provider, number):
    for turn in itertools.count():
        sandbox = await provider.create(SandboxRequest(f"{worker}-{number}-{turn}", files={"f": "x"}), timeout=120)
        await sandbox.execute("sleep 0.3; (setsid sleep 1000 &)", timeout=60)
        if turn % 2:
            await sandbox.close()
        print("used", flush=True)

async def main():
    setting = Setting("leak", "team", worker, "%08x" % os.getpid(), image, SandboxLimits(cpus=0.1, memory_mib=64, disk_mib=24), 900, image)
    async with PodSandboxes(setting, namespace, most_alive=6, lease_seconds=int(lease)) as provider:
        await asyncio.gather(*(slot(provider, number) for number in range(3)))

asyncio.run(main())
"""


async def test_killed_workers_leave_no_pod_once_a_sibling_looked_on_for_as_long_as_a_lease_lasts(
    pods: Callable[..., PodSandboxes], cluster: Any, namespace: str, sandbox_image: str
) -> None:
    chance = random.Random(4)
    environ = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig)}
    used = 0
    for life in range(3):
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, f"rollout-{index}", namespace, sandbox_image, str(LEASE_SECONDS)],
                env=environ,
                stdout=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        # In the first life after something was used, in the others at any moment.
        if life == 0:
            for worker in workers:
                assert worker.stdout is not None and worker.stdout.readline() == "used\n"
        await asyncio.sleep(chance.uniform(0.5, 6))
        for worker in workers:
            worker.kill()
            used += (worker.communicate()[0] or "").count("used") + (life == 0)
    assert used >= 2 and left(cluster, namespace)

    # One that lives: its own pods stay, the others' go.
    async with pods(run="leak", worker="rollout-9", lease_seconds=LEASE_SECONDS) as sibling:
        living = await sibling.create(SandboxRequest("living"), timeout=120)
        deadline = time.monotonic() + 120
        while max(len(left(cluster, namespace)), len(left(cluster, namespace, "leases"))) > 1 and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
        (name,) = left(cluster, namespace)
        assert "living" in name
        assert (await living.execute("echo alive", timeout=60)).output == "alive\n"
    while left(cluster, namespace) and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    assert not left(cluster, namespace) and not left(cluster, namespace, "leases")


def left(cluster: Any, namespace: str, kind: str = "pods") -> list[str]:
    found: str = cluster.kubectl("get", kind, f"--namespace={namespace}", "--output=name", "--selector=dagger-operator.dev/run=leak")
    return found.split()
