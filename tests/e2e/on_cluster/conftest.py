"""The chart installed on a real cluster with images of this checkout: its operator, its S3 server, and a namespace for runs."""

import asyncio
import base64
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dagger_operator.api import Storage
from dagger_operator.store.credentials import Keys
from dagger_operator.store.fsck import fsck
from dagger_operator.store.objects import Store
from fixtures.metrics import started as prometheus_server
from fixtures.on_cluster import Scraping

ROOT = Path(__file__).parents[3]
SAMPLES = ROOT / "manifests" / "samples" / "quickstart"
RELEASE, SYSTEM, SANDBOXES = "dagger-operator", "dagger-system", "dagger-sandboxes"
S3_IMAGE = "localhost/versitygw:1.8.0"
S3_SECRET = "dagger-operator-s3"
"""Secret with the keys of the S3 server, in the runs' namespace too; the server's Service has the same name."""
RUN, MANAGED = "dagger-operator.dev/run", "app.kubernetes.io/managed-by=dagger-operator"


@dataclass(frozen=True)
class Installation:
    """An installed chart, and a namespace in which runs live."""

    kubernetes: Any
    """`Kubernetes` of tests/conftest.py."""
    namespace: str
    system: str = SYSTEM
    """Namespace of the operator and the S3 server."""
    sandboxes: str = SANDBOXES

    def kubectl(self, *arguments: str, input: str | None = None, timeout: float = 120) -> str:
        """In the namespace of the runs."""
        printed: str = self.kubernetes.kubectl("--namespace", self.namespace, *arguments, input=input, timeout=timeout)
        return printed

    def apply(self, *documents: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(documents))

    def sample(self, file: str) -> list[dict[str, Any]]:
        """The documents of a file of the quickstart's sample."""
        return list(yaml.safe_load_all((SAMPLES / file).read_text()))

    def run(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.kubernetes.read("daggerruns", namespace=self.namespace, name=name)
        return found

    def listed(self, resources: str, selector: str = "", namespace: str | None = None) -> list[dict[str, Any]]:
        """Objects of one or several resources: `pods,leases`."""
        where = namespace or self.namespace
        return [one for each in resources.split(",") for one in self.kubernetes.read(each, namespace=where, selector=selector)]

    def store(self, url: str) -> Store:
        """What is below a prefix of the S3 server, by its Service's address: names of the cluster mean nothing here."""
        secret = json.loads(self.kubectl("get", "secret", S3_SECRET, "-o", "json"))["data"]
        where = self.kubectl("--namespace", self.system, "get", "service", S3_SECRET, "-o", "jsonpath={.spec.clusterIP}")
        storage = Storage(url=url, endpoint_url=f"http://{where}:7070", region="us-east-1")
        keys = {key: base64.b64decode(value).decode() for key, value in secret.items()}
        return Store.open(storage, Keys(keys, f"Secret {S3_SECRET}"))

    def all_is_sound(self, name: str) -> None:
        """What `daggerctl store fsck --deep` checks, of a run that has ended."""
        report = asyncio.run(fsck(self.store(self.run(name)["spec"]["storage"]["url"]), deep=True))
        assert report.sound, str(report)

    def nothing_is_left(self, name: str) -> None:
        """First of a run that has ended: no sandbox, no Lease of a worker, no pod that may still run. Then, once it is deleted, of all that
        it had, except what is in storage."""
        self.until(f"sandboxes, Leases and pods of {name} are gone", lambda: not self._held(name), 240)
        self.kubectl("delete", "daggerrun", name, "--timeout=60s")
        # Bindings have no owner: the operator looks for them once a minute.
        self.until(f"nothing of {name} is left", lambda: not self._held(name) and not self._owned(name), 240)

    def _held(self, name: str) -> list[str]:
        sandboxes = self.listed("pods,leases", namespace=self.sandboxes)
        pods = [pod for pod in self.listed("pods", f"{RUN}={name}") if pod["status"].get("phase") not in ("Succeeded", "Failed")]
        return [one["metadata"]["name"] for one in (*sandboxes, *pods)]

    def _owned(self, name: str) -> list[str]:
        """The chart's own accounts and bindings are there as well, without the label of a run."""
        kinds, selector = "pods,jobs,deployments,services,networkpolicies,serviceaccounts,rolebindings", f"{MANAGED},{RUN}={name}"
        here, there = self.listed(kinds, selector), self.listed("serviceaccounts,rolebindings", selector, self.sandboxes)
        return [f"{one['kind']} {one['metadata']['name']}" for one in (*here, *there)]

    def operators(self) -> list[dict[str, Any]]:
        return self.listed("pods", "app.kubernetes.io/name=dagger-operator,app.kubernetes.io/component=operator", self.system)

    def upgrade(self, *settings: str) -> None:
        """`helm upgrade` of the release to the same chart with further values."""
        command = [_built("helm"), f"--kubeconfig={self.kubernetes.kubeconfig}", "--namespace", self.system, "upgrade", RELEASE]
        _run([*command, str(ROOT / "helm" / "dagger-operator"), "--reuse-values", "--wait", *(f"--set={one}" for one in settings)])

    def kill_operator(self) -> None:
        self.kill(self.system, "app.kubernetes.io/name=dagger-operator,app.kubernetes.io/component=operator")

    def kill_sandboxes(self) -> None:
        """Also those that do not run yet: one may have done its work before the kubelet says that it runs."""
        self.kill(self.sandboxes, "app.kubernetes.io/component=sandbox", phases=("Pending", "Running"))

    def kill(self, namespace: str, selector: str, phases: Sequence[str] = ("Running",)) -> None:
        """Pods go at once, as when their node loses power. Fails where there is none in these phases that is not about to end anyway."""

        def there() -> bool:
            pods = [pod for pod in self.listed("pods", selector, namespace) if "deletionTimestamp" not in pod["metadata"]]
            return any(pod["status"].get("phase") in phases for pod in pods)

        self.until(f"a pod with {selector} is there", there, 120)
        self.kubectl("--namespace", namespace, "delete", "pods", "--grace-period=0", "--force", "--selector", selector)

    def until(self, what: str, holds: Callable[[], Any], seconds: float) -> Any:
        """Looks until something holds, and returns what it gave; fails with what the runs and pods say. An API server that does not answer
        for a while is waited for."""
        deadline, problem = time.monotonic() + seconds, ""
        while True:
            try:
                if found := holds():
                    return found
                problem = ""
            except RuntimeError as error:
                problem = str(error)
            if time.monotonic() > deadline:
                pytest.fail(f"not within {seconds} s: {what}\n{problem or self.told()}")
            time.sleep(1)

    def ended(self, name: str, seconds: float) -> dict[str, Any]:
        """The run once it has ended."""

        def end() -> dict[str, Any] | None:
            run = self.run(name)
            return run if run.get("status", {}).get("phase") in ("Succeeded", "Failed") else None

        run: dict[str, Any] = self.until(f"run {name} ends", end, seconds)
        assert run["status"]["phase"] == "Succeeded", self.told()
        return run

    def told(self) -> str:
        """What people would look at."""
        parts = [
            self.kubectl("get", "daggerruns,deployments,jobs,pods", "-o", "wide"),
            self.kubectl("--namespace", SANDBOXES, "get", "pods,leases"),
            self.kubectl("--namespace", SYSTEM, "get", "pods"),
            self.kubectl("get", "daggerruns", "-o", "jsonpath={range .items[*]}{.metadata.name}: {.status.conditions}{'\\n'}{end}"),
            self.kubectl("get", "events", "--sort-by=.lastTimestamp")[-6000:],
            self.kubectl("--namespace", SYSTEM, "logs", f"deployment/{RELEASE}", "--tail=40"),
        ]
        return "\n".join(parts)


@pytest.fixture(scope="package")
def installation(cluster: Any, images: None) -> Iterator[Installation]:
    """`helm install` of the chart with its S3 server, and a fresh namespace for runs; both gone afterwards."""
    helm = _built("helm")
    _load_s3_server()
    settings = {
        "s3.enabled": "true",
        "s3.image.repository": S3_IMAGE.partition(":")[0],
        "s3.image.tag": S3_IMAGE.partition(":")[2],
        "resources.requests.cpu": "50m",
        "s3.resources.requests.cpu": "50m",
    }
    with cluster.fresh_namespace() as namespace:
        values = [f"--set={name}={value}" for name, value in settings.items()]
        command = [helm, f"--kubeconfig={cluster.kubeconfig}", "--namespace", SYSTEM]
        chart = str(ROOT / "helm" / "dagger-operator")
        install = ["upgrade", "--install", RELEASE, chart, "--create-namespace", "--take-ownership", "--wait"]
        _run([*command, *install, *values, f"--set=s3.copySecretTo={{{namespace}}}"])
        try:
            yield Installation(cluster, namespace)
        finally:
            # Runs first, while somebody is there for what they have in the namespace of the sandboxes.
            cluster.kubectl("--namespace", namespace, "delete", "daggerruns", "--all", "--timeout=120s")
            _run([*command, "uninstall", RELEASE, "--wait"])
            # The claim of the S3 server outlives the release. Our own cluster goes as a whole.
            cluster.kubectl("delete", "namespace", SYSTEM, f"--wait={str('DAGGER_TEST_KUBECONFIG' in os.environ).lower()}")


@pytest.fixture
def scraping(installation: Installation, prometheus_programs: Path, tmp_path: Path) -> Iterator[Scraping]:
    """A real Prometheus that finds the pods; on the node, from where network policies let nobody be kept from probes."""
    if os.environ.get("DAGGER_TEST_KUBECONFIG"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = prometheus_server(prometheus_programs, tmp_path, f"127.0.0.1:{free.getsockname()[1]}")
    else:
        inside = ["bash", "-c", 'source "$0" && exec nsenter --target "$(first_process)" --net -- "$@"', ROOT / "tests/cluster/lib.sh"]
        address = installation.kubectl("get", "nodes", "-o", "jsonpath={.items[0].status.addresses[0].address}")
        place = prometheus_server(prometheus_programs, tmp_path, f"{address}:19090", inside)
    with place as server, Scraping(installation, server) as scraping:
        yield scraping


@pytest.fixture(scope="package")
def helm_test(installation: Installation) -> Callable[[], str]:
    command = [_built("helm"), f"--kubeconfig={installation.kubernetes.kubeconfig}", "--namespace", SYSTEM, "test", RELEASE]
    return lambda: _run(command)


def _built(tool: str) -> str:
    return _run([sys.executable, str(ROOT / "scripts" / "build-tool"), tool]).strip()


def _run(command: Iterable[str]) -> str:
    done = subprocess.run(list(command), capture_output=True, text=True)
    assert done.returncode == 0, f"{done.args}: {done.stdout}{done.stderr}"
    return done.stdout


def _load_s3_server() -> None:
    """The server as an image; on a cluster of somebody else's, the chart's own is pulled."""
    if os.environ.get("DAGGER_TEST_KUBECONFIG"):
        return
    archive = _image(S3_IMAGE, Path(_built("versitygw")))
    subprocess.run([ROOT / "tests" / "cluster" / "in", "ctr", "-n", "k8s.io", "images", "import", "-"], input=archive, check=True)


def _image(name: str, program: Path) -> bytes:
    """A Docker archive with one static program in it, as its entry point."""
    layer = _tar({f"bin/{program.name}": program.read_bytes()})
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
        "os": "linux",
        "config": {"Entrypoint": [f"/bin/{program.name}"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    return _tar({"config.json": json.dumps(config).encode(), "manifest.json": json.dumps(manifest).encode(), "layer.tar": layer})


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
