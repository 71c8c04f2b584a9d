"""Pods that run the images as every pod of a run does: an ordinary user, a read-only root, no capability."""

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.control.pods import SCRATCH, container, pod_spec

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]


@pytest.fixture(scope="session")
def layout() -> Path:
    """The OCI layout that holds the images."""
    built = subprocess.run([sys.executable, ROOT / "scripts" / "images", "build"], stdout=subprocess.PIPE, text=True, check=True)
    return Path(built.stdout.strip())


def _blob(layout: Path, digest: str) -> Json:
    found: Json = json.loads((layout / "blobs" / digest.replace(":", "/")).read_text())
    return found


def _manifest(layout: Path, name: str) -> Json:
    """Of an image, by its name without registry."""
    index = json.loads((layout / "index.json").read_text())
    (found,) = [m for m in index["manifests"] if m["annotations"]["org.opencontainers.image.ref.name"] == f"docker.io/{name}"]
    return _blob(layout, found["digest"])


@pytest.fixture(scope="session")
def image_config(layout: Path) -> Callable[[str], Json]:
    """The configuration of an image: environment, user, labels."""

    def read(name: str) -> Json:
        config: Json = _blob(layout, _manifest(layout, name)["config"]["digest"])["config"]
        return config

    return read


@pytest.fixture(scope="session")
def image_size(layout: Path) -> Callable[[str], int]:
    """Bytes of all layers of an image, not compressed."""
    return lambda name: sum(layer["size"] for layer in _manifest(layout, name)["layers"])


class Pods:
    """Pods in a namespace that admits restricted ones only."""

    def __init__(self, cluster: Any, namespace: str) -> None:
        self._cluster, self._namespace = cluster, namespace
        cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")

    def start(self, containers: list[Json], **more: Any) -> str:
        """Creates a pod with a writable `/scratch` and `/shared`; its name."""
        for one in [*containers, *more.get("initContainers", ())]:
            one["securityContext"]["readOnlyRootFilesystem"] = True
        spec = pod_spec(containers, volumes=["scratch", "shared"], memory_volumes=["shm"], restartPolicy="Never", **more)
        name = f"image-{uuid.uuid4().hex[:8]}"
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": self._namespace}, "spec": spec}
        self._cluster.kubectl("create", "-f", "-", input=json.dumps(document))
        return name

    def output(self, pod: str, container: str, seconds: float) -> str:
        """What a container printed once it ended well, its last word after others' warnings on standard error."""
        deadline = time.monotonic() + seconds
        while True:
            status = json.loads(self._cluster.kubectl("get", "pod", pod, "-n", self._namespace, "-o", "json"))["status"]
            states = {one["name"]: one["state"] for one in status.get("containerStatuses", ())}
            if ended := states.get(container, {}).get("terminated"):
                break
            assert status["phase"] not in ("Failed", "Succeeded"), status
            assert time.monotonic() < deadline, status
            time.sleep(0.5)
        logs: str = self._cluster.kubectl("logs", pod, "-n", self._namespace, "-c", container)
        assert ended["exitCode"] == 0, logs
        return logs

    def run(self, image: str, *command: str, seconds: float = 120) -> str:
        mounts = [("scratch", SCRATCH)]
        pod = self.start([container("probe", image, command, [], mounts=mounts)])
        return self.output(pod, "probe", seconds)


@pytest.fixture
def pods(cluster: Any, namespace: str) -> Pods:
    return Pods(cluster, namespace)
