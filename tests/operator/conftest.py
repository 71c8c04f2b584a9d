"""The operator as a process against a real API server, and something that plays kubelet: pods do their stage's work at once."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import load_kube_config

from dagger_operator.api import DAggerRun, load
from dagger_operator.cluster.client import Client
from dagger_operator.kube.api import Api
from dagger_operator.kube.connection import session
from dagger_operator.kube.errors import ApiError, Missing
from dagger_operator.store.objects import Store
from dagger_operator.store.owner import take_prefix
from dagger_operator.store.results import save_result
from fixtures.results import result

Json = dict[str, Any]
RUNS = "dagger-operator.dev/v1alpha1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Operator:
    """One replica, as a process."""

    kubeconfig: Path
    log: Path
    environ: dict[str, str]
    health_port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environ = {
            **os.environ,
            "KUBECONFIG": str(self.kubeconfig),
            "DAGGER_OPERATOR_HEALTH_PORT": str(self.health_port),
            "DAGGER_OPERATOR_METRICS_PORT": str(self.metrics_port),
            **self.environ,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "dagger_operator.cluster"], env=environ, stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def ask(self, path: str, port: int | None = None) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port or self.health_port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def metrics(self) -> str:
        return self.ask("/metrics", self.metrics_port)[1]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., DAggerRun]:
    """A run whose storage is a folder, or what `storage` says."""

    def make(name: str = "demo", **storage: Any) -> DAggerRun:
        spec = {
            "student": {"model": "m"},
            "teacher": {"model": "t", "endpoint": {"url": "https://t/v1"}},
            "tasks": {"source": {"type": "JSONL", "uri": "t"}, "heldOut": {"source": {"type": "JSONL", "uri": "h"}}},
            "storage": {"url": f"file://{tmp_path}/{name}", **storage},
        }
        return load({"metadata": {"name": name, "namespace": "lab", "uid": name}, "spec": spec})

    return make


@pytest.fixture
def make_operator(control_plane: Any, namespace: str, tmp_path: Path) -> Iterator[Callable[..., Operator]]:
    """Makes replicas that work in the test's namespace alone; they are ended with the test."""
    made: list[Operator] = []

    def make(**settings: str) -> Operator:
        environ = {f"DAGGER_OPERATOR_{name.upper()}": value for name, value in settings.items()}
        own = {
            "DAGGER_OPERATOR_NAMESPACES": namespace,
            "DAGGER_OPERATOR_NAMESPACE": namespace,
            "DAGGER_OPERATOR_POD": f"operator-{len(made)}",
        }
        made.append(Operator(control_plane.kubeconfig, tmp_path / f"operator-{len(made)}.log", {**own, **environ}))
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.fixture(scope="module")
def operator(control_plane: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One replica for the tests of a module, without a Lease and for all namespaces."""
    folder = tmp_path_factory.mktemp("operator")
    one = Operator(control_plane.kubeconfig, folder / "log", {"DAGGER_OPERATOR_LEASE": "-"})
    one.start()
    yield one
    one.kill()


@pytest.fixture
async def client(control_plane: Any) -> AsyncIterator[Client]:
    settings = Configuration()
    await load_kube_config(config_file=str(control_plane.kubeconfig), client_configuration=settings)
    async with session(settings) as http:
        yield Client(Api(settings, http))


class Lab:
    """One namespace with runs in it, and a folder as their storage."""

    def __init__(self, client: Client, namespace: str, folder: Path) -> None:
        self.client, self.namespace, self.folder = client, namespace, folder
        self.jobs: dict[str, str] = {}
        """Every Job that ever was: name by uid."""
        self.paused: set[str] = set()
        """Components whose pods do nothing."""
        self.working: set[str] = set()
        """Stages whose pods run and do not end."""
        self.failing: set[str] = set()
        """Stages whose pods end with `exit_code`."""
        self.exit_code = 3
        """By default one that no retry mends."""

    def store(self, name: str) -> Store:
        return Store.open(load(self.document(name)).spec.storage)

    def document(self, name: str, **spec: Any) -> Json:
        """A run of one round with a served student and training."""
        held_out = {"source": {"type": "JSONL", "uri": "h"}}
        whole = {
            "rounds": 1,
            "student": {"model": "m", "serving": {"gpus": 0}},
            "teacher": {"model": "t", "endpoint": {"url": "https://teacher.example/v1"}},
            "tasks": {"source": {"type": "JSONL", "uri": "t"}, "heldOut": held_out},
            "storage": {"url": f"file://{self.folder}/{name}"},
            **spec,
        }
        return {"apiVersion": RUNS, "kind": "DAggerRun", "metadata": {"name": name, "namespace": self.namespace}, "spec": whole}

    async def create(self, name: str = "demo", **spec: Any) -> Json:
        return await self.client.create(self.document(name, **spec))

    async def create_short(self, name: str = "demo", **spec: Any) -> Json:
        """A run of rollouts alone: nothing is served, nothing trained."""
        student = {"model": "s", "endpoint": {"url": "https://student.example/v1"}}
        return await self.create(name, **{"student": student, "training": {"mode": "Disabled"}, **spec})

    async def run(self, name: str = "demo") -> Json:
        return await self.client.get(RUNS, "DAggerRun", self.namespace, name)

    async def edit(self, name: str = "demo", **spec: Any) -> None:
        head = {"apiVersion": RUNS, "kind": "DAggerRun", "metadata": {"name": name, "namespace": self.namespace}}
        await self.client.patch({**head, "spec": spec})

    async def delete(self, name: str = "demo", propagation: str = "Background") -> None:
        await self.client.delete(RUNS, "DAggerRun", self.namespace, name, preconditions={}, propagation=propagation)

    async def objects(self, api_version: str, kind: str) -> list[Json]:
        ours = "app.kubernetes.io/managed-by=dagger-operator"
        return [one async for one in self.client.list(api_version, kind, self.namespace, labelSelector=ours)]

    async def until(self, what: Callable[[], Awaitable[Any]], seconds: float = 60) -> Any:
        """Waits until something is true, and returns it."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Missing):
                if found := await what():
                    return found
            assert time.monotonic() < deadline, f"still not: {json.dumps(await self._seen(), indent=1)[-4000:]}"
            await asyncio.sleep(0.2)

    async def until_phase(self, phase: str, name: str = "demo", seconds: float = 90) -> Json:
        async def reached() -> Json | None:
            run = await self.run(name)
            return run if (run.get("status") or {}).get("phase") == phase else None

        found: Json = await self.until(reached, seconds)
        return found

    async def until_job(self, stage: str, name: str = "demo") -> Json:
        """The Job of a stage, once it is there and is not going."""

        async def there() -> Json | None:
            jobs = [one for one in await self.objects("batch/v1", "Job") if one["metadata"].get("deletionTimestamp") is None]
            return next((one for one in jobs if f"{name}-r" in one["metadata"]["name"] and f"-{stage}-" in one["metadata"]["name"]), None)

        found: Json = await self.until(there)
        return found

    async def until_reason(self, reason: str, name: str = "demo", seconds: float = 60) -> Json:
        async def reached() -> Json | None:
            run = await self.run(name)
            return run if (run.get("status") or {}).get("reason") == reason else None

        found: Json = await self.until(reached, seconds)
        return found

    async def _seen(self) -> Any:
        runs = [one.get("status") async for one in self.client.list(RUNS, "DAggerRun", self.namespace)]
        return [runs, [one["metadata"]["name"] for one in await self.objects("batch/v1", "Job")]]

    async def play(self) -> None:
        """Plays kubelet for ever: servers become Ready, stages leave their result and succeed."""
        while True:
            with contextlib.suppress(ApiError):
                for job in await self.objects("batch/v1", "Job"):
                    self.jobs[job["metadata"]["uid"]] = job["metadata"]["name"]
                for pod in await self.objects("v1", "Pod"):
                    await self._work(pod)
            await asyncio.sleep(0.1)

    async def _work(self, pod: Json) -> None:
        labels = pod["metadata"]["labels"]
        component = labels["dagger-operator.dev/component"]
        phase = (pod.get("status") or {}).get("phase")
        at_work = phase == "Running" and component not in ("student", "teacher")
        if not (phase == "Pending" or at_work) or pod["spec"].get("schedulingGates") or component in self.paused:
            return
        if component in self.working:
            if not at_work:
                await self._set(pod, {"phase": "Running"})
            return
        if component in ("student", "teacher"):
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            ready = [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in ("Ready", "ContainersReady")]
            status: Json = {"phase": "Running", "conditions": ready}
        elif component in self.failing:
            said = json.dumps({"reason": "TaskSourceMissing", "message": "there are no tasks"})
            ended = {"exitCode": self.exit_code, "reason": "Error", "message": said, "finishedAt": "2026-01-01T00:00:00Z"}
            stage = {"name": "stage", "image": "i", "imageID": "", "restartCount": 0, "ready": False, "state": {"terminated": ended}}
            status = {"phase": "Failed", "containerStatuses": [stage]}
        else:
            name, number = labels["dagger-operator.dev/run"], int(labels["dagger-operator.dev/round"])
            store = self.store(name)
            await take_prefix(store, load(await self.run(name)))
            await save_result(store, number, result(component, number))
            status = {"phase": "Succeeded"}
        await self._set(pod, status)

    async def _set(self, pod: Json, status: Json) -> None:
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}/status"
        await self.client._ask("PATCH", path, body={"status": status}, content="application/merge-patch+json")


@pytest.fixture
async def lab(client: Client, namespace: str, tmp_path: Path) -> AsyncIterator[Lab]:
    """A namespace whose pods do their work."""
    lab = Lab(client, namespace, tmp_path / "storage")
    playing = asyncio.create_task(lab.play())
    yield lab
    playing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await playing
