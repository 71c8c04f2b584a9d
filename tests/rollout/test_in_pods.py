"""A worker's stage with sandboxes that are pods: the process is a real worker in all but its files, for it lives in a pod's network."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from dagger_operator.store.layout import Kind
from dagger_operator.store.records import Outcome
from dagger_operator.store.trajectories import read_trajectories

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(300),
    pytest.mark.skipif("DAGGER_TEST_KUBECONFIG" in os.environ, reason="a pod's network can be entered on our own cluster alone"),
]

AGENT = r"""
reaches() { timeout 2 bash -c "exec 3<>/dev/tcp/$1" 2>/dev/null; }
# A network plugin may take a moment to close a new pod.
while read -r place; do
  for try in {1..40}; do reaches "$place" || continue 2; sleep 0.25; done
  echo "$place" >> leaked.txt
done < places.txt
address=${OPENAI_BASE_URL#http://}
body='{"model": "policy", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "'$DAGGER_TASK_STATEMENT'"}]}'
exec 3<>/dev/tcp/${address%%:*}/$(echo "$address" | sed 's|.*:||; s|/.*||')
printf 'POST /%s/chat/completions HTTP/1.0\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: %s\r\n\r\n%s' \
  "${address#*/}" "$OPENAI_API_KEY" "${#body}" "$body" >&3
grep -q 'cat value.txt' <&3 && sed -i s/wrong/right/ "$BROKEN"
"""


@pytest.fixture
def policies_host(cluster: Any) -> str:
    """Where pods reach them."""
    return str(cluster.host)


@pytest.fixture
def pod_of_a_worker(cluster: Any) -> Iterator[tuple[str, str, list[str]]]:
    """Namespace and address of a pod that is labelled as a worker's are, and what a command begins with that runs in its network."""
    mark = f"98{os.getpid()}"
    labels = {"app.kubernetes.io/managed-by": "dagger-operator", "dagger-operator.dev/component": "rollout"}
    container = {"name": "main", "image": "localhost/busybox:1", "command": ["sleep", mark]}
    spec = {"terminationGracePeriodSeconds": 0, "containers": [container]}
    with cluster.fresh_namespace() as namespace:
        where = f"--namespace={namespace}"
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worker", "labels": labels}, "spec": spec}
        cluster.kubectl(where, "create", "-f", "-", input=json.dumps(pod))
        cluster.kubectl(where, "wait", "--for=condition=Ready", "pod/worker", "--timeout=90s")
        address = cluster.kubectl(where, "get", "pod", "worker", "--output=jsonpath={.status.podIP}")
        pid = next(process.pid for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", mark])
        yield namespace, address, ["nsenter", f"--target={pid}", "--net", "--"]


async def test_an_agent_inside_a_pod_reaches_the_gateway_of_its_worker_and_nothing_else(
    ground: Any,
    cluster: Any,
    namespace: str,
    sandbox_image: str,
    sandbox_policies: None,
    pod_of_a_worker: tuple[str, str, list[str]],
) -> None:
    run_namespace, address, in_the_pod = pod_of_a_worker
    run = ground.run(
        train=2,
        mixing={"beta": {"type": "Constant", "value": 1.0}},
        scaffold={"type": "Command", "command": ["bash", "agent.sh"], "maxTurns": 4},
        sandbox={"backend": "Pod", "image": sandbox_image, "limits": {"cpus": 0.5, "memoryMib": 128, "processes": 64}},
    )
    policies, server = ground.policies.url.split("/")[2].split(":"), cluster.kubectl("config", "view", "--output=jsonpath={..server}")
    places = "".join(f"{host}/{port}\n" for host, port in (policies, server.split("/")[2].split(":"), (address, 9090)))
    rows = [json.loads(line) for line in (ground.root / "train.jsonl").read_text().splitlines()]
    more = {"agent.sh": AGENT, "places.txt": places, "env.sh": "export BROKEN=value.txt\n"}
    rows = [row | {"files": row["files"] | more, "env": {"BASH_ENV": "/testbed/env.sh"}} for row in rows]
    (ground.root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environ = {
        **ground.environ(run),
        "KUBECONFIG": str(cluster.kubeconfig),
        "POD_IP": address,
        "DAGGER_POD": "worker",
        "DAGGER_RUN_NAMESPACE": run_namespace,
        "DAGGER_SANDBOX_NAMESPACE": namespace,
        "DAGGER_HELPER_IMAGE": sandbox_image,
    }
    worker = await asyncio.create_subprocess_exec(
        *in_the_pod, sys.executable, "-m", "dagger_operator.rollout", env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        said, _ = await asyncio.wait_for(worker.communicate(), 200)
    finally:
        if worker.returncode is None:
            worker.kill()
    assert worker.returncode == 0, said.decode()
    assert b"through exec" not in said, "the pod network is open to workers"
    ended = [trajectory async for trajectory in read_trajectories(ground.store(run), 1, Kind.ROLLOUT)]
    assert [trajectory.outcome for trajectory in ended] == [Outcome.RESOLVED] * 2, said.decode()
    for trajectory in ended:
        assert "value.txt must say" in trajectory.turns[0].messages[1]["content"]
        assert "+right" in trajectory.patch and "leaked" not in trajectory.patch, trajectory.patch
    deadline = time.monotonic() + 60
    while left := cluster.kubectl("get", "pods,leases", f"--namespace={namespace}", "--output=name"):
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.5)
