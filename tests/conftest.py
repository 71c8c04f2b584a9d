"""Fixtures that every room's tests may use."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from kubernetes.aio.client import ApiClient
from kubernetes.aio.config import new_client_from_config

from dagger_operator import __version__
from dagger_operator.api import Storage
from dagger_operator.store.objects import Store

# How long an example takes says nothing on a busy machine.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class S3:
    """A bucket of its own on a real S3 server, and what a client's environment has to hold."""

    storage: Storage
    environ: dict[str, str]

    @property
    def url(self) -> str:
        return self.storage.url

    def open(self) -> Store:
        return Store.open(self.storage, self.environ)


@pytest.fixture(scope="session")
def versitygw() -> Iterator[tuple[str, Path]]:
    """A running S3 server: its endpoint, and the folder whose subfolders are its buckets."""
    program = _built("versitygw")
    root = _folder_with_attributes(Path(tempfile.gettempdir()), program.parent)
    (root / "buckets").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", f"127.0.0.1:{port}", "--quiet", "posix", root / "buckets"]
    environ = {
        "PATH": os.environ["PATH"],
        "ROOT_ACCESS_KEY_ID": _KEYS["AWS_ACCESS_KEY_ID"],
        "ROOT_SECRET_ACCESS_KEY": _KEYS["AWS_SECRET_ACCESS_KEY"],
    }
    with (root / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ)
    try:
        _wait_for(port, server, root / "log")
        yield f"http://127.0.0.1:{port}", root / "buckets"
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def s3(versitygw: tuple[str, Path]) -> S3:
    """A fresh bucket with a prefix in it."""
    endpoint, buckets = versitygw
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    (buckets / bucket).mkdir()
    return S3(Storage(url=f"s3://{bucket}/runs/one", endpoint_url=endpoint, region="us-east-1"), dict(_KEYS))


_KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "for-tests-on-loopback-only"}


def _folder_with_attributes(*parents: Path) -> Path:
    """The server keeps ETags in extended attributes. (Its `--sidecar` does without, and then loses updates: `store.check` shows it.)"""
    for parent in parents:
        folder = Path(tempfile.mkdtemp(prefix="dagger-s3-", dir=parent))
        try:
            os.setxattr(folder, "user.dagger", b"1")
            return folder
        except OSError:
            folder.rmdir()
    raise RuntimeError(
        f"no file system with extended attributes below any of {', '.join(map(str, parents))}: set TMPDIR to a folder on one"
    )


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"versitygw ended with {server.returncode}: {log.read_text()[-2000:]}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"versitygw did not listen within 60 s: {log.read_text()[-2000:]}")


@dataclass(frozen=True)
class Kubernetes:
    """A cluster with our CRD in it, and how to speak to it: tests/cluster/README.md."""

    kubeconfig: Path
    program: Path
    """kubectl."""
    host: str | None = None
    """This machine, as pods see it; None where there are no pods or nobody said."""

    def kubectl(self, *arguments: str | Path, input: str | None = None, timeout: float = 120) -> str:
        """What it prints. Raises `RuntimeError` with what it says where it fails."""
        command = [self.program, f"--kubeconfig={self.kubeconfig}", *arguments]
        done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}")
        return done.stdout

    @asynccontextmanager
    async def client(self) -> AsyncIterator[ApiClient]:
        async with await new_client_from_config(str(self.kubeconfig)) as client:
            yield client

    @contextmanager
    def fresh_namespace(self) -> Iterator[str]:
        name = f"test-{uuid.uuid4().hex[:8]}"
        self.kubectl("create", "namespace", name)
        self.kubectl("wait", "--for=create", "serviceaccount/default", f"--namespace={name}", "--timeout=60s")
        try:
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false")

    def with_crd(self) -> "Kubernetes":
        crd = ROOT / "manifests" / "crd" / "daggerruns.yaml"
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", crd)
        # `kubectl wait` for a condition fails on one that has no conditions yet.
        self.kubectl("wait", "--for=jsonpath={.status.acceptedNames.kind}=DAggerRun", "-f", crd, "--timeout=60s")
        _patiently(lambda: self.kubectl("get", "daggerruns", "--all-namespaces"))
        return self


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    """An API server with its controllers, without a node: objects come and go, no pod ever runs."""
    folder = tmp_path_factory.mktemp("control-plane")
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    kubectl = Path(assets) / "kubectl" if assets else _built("kubernetes", "kubectl")
    address = f"127.77.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"  # nobody else's
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([ROOT / "tests" / "cluster" / "control-plane", folder, address], stdout=log, stderr=log)
    try:
        while not (folder / "kubeconfig").exists():
            if process.poll() is not None:
                raise RuntimeError(f"control-plane ended with {process.returncode}: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield Kubernetes(folder / "kubeconfig", kubectl).with_crd()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Kubernetes]:
    """A whole cluster: the one behind DAGGER_TEST_KUBECONFIG, or our own, which goes with the session unless it was up before."""
    scripts = ROOT / "tests" / "cluster"
    if given := os.environ.get("DAGGER_TEST_KUBECONFIG"):
        yield Kubernetes(Path(given), _built("kubernetes", "kubectl"), os.environ.get("DAGGER_TEST_HOST")).with_crd()
        return
    was_up = subprocess.run([scripts / "in", "true"], capture_output=True).returncode == 0
    try:
        said = dict(re.findall(r"(\w+)=(\S+)", subprocess.run([scripts / "up"], stdout=subprocess.PIPE, text=True, check=True).stdout))
        yield Kubernetes(Path(said["KUBECONFIG"]), _built("kubernetes", "kubectl"), said["DAGGER_TEST_HOST"]).with_crd()
    finally:
        if not was_up:
            subprocess.run([scripts / "down"], check=True)


@pytest.fixture(scope="session")
def images(cluster: Kubernetes) -> dict[str, str]:
    """The project's images by target (`operator`, ...): built, and on the node; on a cluster of the user's own they have to be there."""
    if not os.environ.get("DAGGER_TEST_KUBECONFIG"):
        subprocess.run([ROOT / "scripts" / "images", "load"], stdout=subprocess.PIPE, check=True)
    targets = ("operator", "worker", "trainer", "quickstart", "vllm-cpu")
    return {target: f"dagger-operator/{target}:{__version__}" for target in targets}


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh namespace on the cluster that the test uses, deleted after it."""
    used: Kubernetes = request.getfixturevalue("cluster" if "cluster" in request.fixturenames else "control_plane")
    with used.fresh_namespace() as name:
        yield name


def _patiently(attempt: Callable[[], object], seconds: float = 60) -> None:
    """Until it raises nothing."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            attempt()
            return
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _built(tool: str, *programs: str) -> Path:
    """A Go program, or one of a module's; built at its first use on this machine."""
    command = [sys.executable, ROOT / "scripts" / "build-tool", tool, *programs]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip(), *programs)


class Documented:
    """The tables of docs/metrics.md, to hold a real exposition against them."""

    def __init__(self, path: Path) -> None:
        self.tables: dict[str, dict[str, tuple[str, dict[str, frozenset[str] | None]]]] = {}
        """By section, then by metric: its type, and its labels with their values where they are a closed set."""
        section = ""
        for line in path.read_text().splitlines():
            section = line.removeprefix("## ") if line.startswith("## ") else section
            if row := re.match(r"\| `(\w+)` \| (\w+) \| [^|]+ \| ([^|]+) \|", line):
                labels = re.findall(r"`(\w+)`(?: \(([^)]*)\))?", row[3])
                closed = {label: frozenset(values.split(", ")) if values else None for label, values in labels}
                self.tables.setdefault(section, {})[row[1]] = (row[2], closed)

    def differences(self, series: Iterable[dict[str, str]], *sections: str) -> list[str]:
        """What is wrong with samples (labels, the name as `__name__`) of who exposes these sections; nothing where all is well."""
        known = {name: row for section in sections for name, row in self.tables[section].items()}
        found, wrong = dict[str, set[str]](), set[str]()
        for labels in series:
            sample = labels["__name__"]
            if re.match(r"(process|python|scrape|vllm:)|up$", sample):
                continue
            name = sample if sample in known else re.sub(r"_(bucket|sum|count)$", "", sample)
            if name not in known or (name == sample) == (known[name][0] == "histogram"):
                wrong.add(f"{sample} is not documented")
                continue
            kind, closed = known[name]
            if (kind == "counter") != name.endswith("_total"):
                wrong.add(f"{name} is no {kind} by its name")
            own = {key: value for key, value in labels.items() if key not in ("__name__", "job", "instance", "le")}
            found.setdefault(name, set()).update(own)  # not all in each: to Prometheus a label that is empty is none
            wrong |= {f"{name}: {key} is {value}" for key, value in own.items() if value not in (closed.get(key) or (value,))}
        wrong |= {f"{name} has the labels {sorted(own)}" for name, own in found.items() if own != known[name][1].keys()}
        return sorted(wrong) + [f"{name} has no samples" for name in sorted(known.keys() - found)]


@pytest.fixture(scope="session")
def documented_metrics() -> Documented:
    return Documented(ROOT / "docs" / "metrics.md")


class Prometheus:
    """A real Prometheus that scrapes every second what it is told to."""

    def __init__(self, url: str, folder: Path, programs: Path) -> None:
        self._url, self._folder, self._programs = url, folder, programs
        self._targets: dict[str, set[str]] = {}

    def watch(self, job: str, *targets: str) -> None:
        """Scrapes `targets` (host:port) too, as `job`."""
        if self._targets.setdefault(job, set()).issuperset(targets):
            return
        self._targets[job] |= set(targets)
        groups = [{"targets": sorted(targets), "labels": {"job": job}} for job, targets in self._targets.items()]
        partial = self._folder / "targets.partial"
        partial.write_text(json.dumps(groups))
        partial.rename(self._folder / "targets.json")

    def series(self, job: str) -> list[dict[str, str]]:
        """Labels of every series that was ever scraped of a job, with its name as `__name__`."""
        found: list[dict[str, str]] = self._get("series", **{"match[]": f'{{job="{job}"}}'})
        return found

    def value(self, query: str) -> float | None:
        """Of an instant query that gives one number; None where it gives none."""
        result = self._get("query", query=query)["result"]
        return float(result[0]["value"][1]) if result else None

    def _get(self, what: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def lint(self, exposition: bytes) -> str:
        """What `promtool check metrics` finds wrong; nothing where all is well."""
        command = [self._programs / "promtool", "check", "metrics"]
        return subprocess.run(command, input=exposition, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout.decode()


@pytest.fixture(scope="session")
def prometheus_programs() -> Path:
    """The folder of `prometheus` and `promtool`."""
    return Path(subprocess.run([ROOT / "scripts" / "prometheus"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip())


@pytest.fixture
def prometheus(prometheus_programs: Path, tmp_path: Path) -> Iterator[Prometheus]:
    folder = tmp_path / "prometheus"
    folder.mkdir()
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": "tests", "file_sd_configs": [{"files": [str(folder / "targets.json")]}]}],
    }
    (folder / "prometheus.yaml").write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([prometheus_programs / "prometheus", *arguments], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/-/ready", timeout=5):
                break
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.1)
        yield Prometheus(f"http://{address}", folder, prometheus_programs)
    finally:
        server.kill()
        server.wait()
