"""The cluster for measuring the operator: a real API server with its controllers and its scheduler, and KWOK in place of nodes."""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NODES = 20
CHILDREN = ("deployments", "jobs", "services", "serviceaccounts", "networkpolicies", "rolebindings")
_ADDRESS = "127.78.0.1"
_QUICK = ("--kube-api-qps=2000", "--kube-api-burst=4000")
"""The bottleneck should be the operator, not the client rate limit of Kubernetes' own controllers."""
_KWOK = ("--cidr=10.0.0.0/8", "--node-lease-duration-seconds=40")
"""A node whose Lease is not renewed is considered dead, and its pods not ready."""


class NotUp(RuntimeError):
    """A part of the cluster does not start; the message contains the end of its log."""


@dataclass(frozen=True)
class ScaleCluster:
    kubeconfig: Path
    _program: Path

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        command = [self._program, f"--kubeconfig={self.kubeconfig}", *arguments]
        return subprocess.run(command, input=input, check=True, capture_output=True, text=True).stdout

    def nodes_are_ready(self) -> bool:
        return self.kubectl("get", "nodes", "--no-headers").count(" Ready ") == NODES

    def serves_runs(self) -> bool:
        return "daggerruns" in self.kubectl("api-resources", "--api-group=dagger-operator.dev")

    def pods(self) -> int:
        """Return the number of pods, including completed ones."""
        return int(json.loads(self._get("/api/v1/pods?limit=1"))["metadata"].get("remainingItemCount", 0)) + 1

    def pending(self, namespace: str) -> bool:
        """Whether some pod is not running yet."""
        query = "fieldSelector=status.phase%3DPending&limit=1"
        return bool(json.loads(self._get(f"/api/v1/namespaces/{namespace}/pods?{query}"))["items"])

    def children(self) -> int:
        """Return the number of objects that the operator created."""
        ours = "--selector=app.kubernetes.io/managed-by=dagger-operator"
        made = self.kubectl("get", ",".join(CHILDREN), "--all-namespaces", ours, "--output=name")
        return len(made.splitlines())

    def applied(self) -> dict[tuple[str, str], int]:
        """Return the number of successful server-side applies of these kinds, by resource and subresource: only the operator makes any."""
        tally: dict[tuple[str, str], int] = {}
        for key, count in samples(self._get("/metrics"), "apiserver_request_total", "resource", "subresource", "code", verb="APPLY"):
            if key[2].startswith("2") and key[0] in (*CHILDREN, "daggerruns"):
                tally[key[0], key[1]] = tally.get((key[0], key[1]), 0) + int(count)
        return tally

    def _get(self, path: str) -> str:
        return self.kubectl("get", "--raw", path)


def samples(exposition: str, name: str, *by: str, **labels: str) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield samples of a metric with these labels, each with the values of the labels in `by`."""
    from prometheus_client.parser import text_string_to_metric_families as families

    lines = "\n".join(line for line in exposition.splitlines() if line.startswith((f"{name}{{", f"{name} ")))
    for family in families(lines + "\n"):
        for sample in family.samples:
            if all(sample.labels.get(label) == value for label, value in labels.items()):
                yield tuple(sample.labels.get(label, "") for label in by), sample.value


@contextlib.contextmanager
def scale_cluster() -> Iterator[ScaleCluster]:
    """Run a fresh cluster, with our CRD and `NODES` KWOK nodes; everything is removed afterwards."""
    tools = _built("kubernetes")
    folder = Path(tempfile.mkdtemp(prefix="dagger-scale-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)

        def run(name: str, *command: str | Path) -> subprocess.Popen[bytes]:
            return stack.enter_context(_running(folder / f"{name}.log", *command))

        plane = run("control-plane", ROOT / "tests/cluster/control-plane", folder, _ADDRESS, *_QUICK)
        kubeconfig = folder / "kubeconfig"
        _until(kubeconfig.exists, plane, folder / "control-plane.log")
        cluster = ScaleCluster(kubeconfig, tools / "kubectl")
        run("scheduler", tools / "kube-scheduler", f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--secure-port=0", *_QUICK)
        stages = ROOT / "benchmarks/scale.stages.yaml"
        kwok = run("kwok", _built("kwok"), f"--kubeconfig={kubeconfig}", "--manage-all-nodes", f"--config={stages}", *_KWOK)
        cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "manifests/crd/daggerruns.yaml"))
        cluster.kubectl("create", "-f", "-", input="---\n".join(json.dumps(_node(number)) + "\n" for number in range(NODES)))
        _until(cluster.nodes_are_ready, kwok, folder / "kwok.log")
        _until(cluster.serves_runs, plane, folder / "control-plane.log")
        yield cluster


def _node(number: int) -> dict[str, object]:
    name = f"kwok-{number:02d}"
    metadata = {"name": name, "labels": {"kubernetes.io/hostname": name}, "annotations": {"node.alpha.kubernetes.io/ttl": "0"}}
    return {"apiVersion": "v1", "kind": "Node", "metadata": metadata}


@contextlib.contextmanager
def _running(log: Path, *command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that ends with this one, however it ends."""
    with log.open("wb") as said:
        process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdout=said, stderr=said)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _until(true: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if process.poll() is not None or time.monotonic() > deadline:
            raise NotUp(f"{log.stem} does not get up: {log.read_text()[-2000:]}")
        time.sleep(0.2)


def _built(tool: str) -> Path:
    """Return a program, or the folder of a module's programs; built on first use on this machine."""
    command = [sys.executable, ROOT / "scripts/build-tool", tool]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())
