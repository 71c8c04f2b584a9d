"""The test cluster is a real one: pods run, can be reached and can reach us, and nothing is left when it is gone."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from fixtures.kubernetes import started_control_plane
from fixtures.tools import ROOT, built

pytestmark = pytest.mark.heavy

HERE = Path(__file__).parent
ours = pytest.mark.skipif("DAGGER_TEST_KUBECONFIG" in os.environ, reason="another cluster was given; this is about our own")
Json = dict[str, Any]


def pod(name: str, command: str, **spec: Any) -> Json:
    container = {"name": "main", "image": "localhost/busybox:1", "command": ["sh", "-c", command]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"terminationGracePeriodSeconds": 0, "containers": [container], **spec},
    }


class Room:
    """One namespace of the cluster."""

    def __init__(self, cluster: Any, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace

    def __call__(self, *arguments: str, **more: Any) -> str:
        said: str = self.cluster.kubectl(f"--namespace={self.namespace}", *arguments, **more)
        return said

    def make(self, *objects: Json) -> None:
        self("create", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def read(self, path: str, *what: str) -> str:
        return self("get", *what, "-o", f"jsonpath={{{path}}}")


@pytest.fixture
def room(cluster: Any, namespace: str) -> Room:
    return Room(cluster, namespace)


@pytest.fixture
def server(cluster: Any) -> Iterator[int]:
    """Port of a server on this machine, at the address that pods use for this machine."""

    class Hello(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"from the test\n")

        def log_message(self, *_: Any) -> None:
            pass

    listening = HTTPServer((cluster.host, 0), Hello)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening.server_port
    listening.shutdown()
    listening.server_close()


@ours
def test_pods_and_services_are_reached_from_a_test_and_reach_it(room: Room, cluster: Any, server: int) -> None:
    service = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}
    room.make(
        pod("web", "mkdir /tmp/www; echo from the pod >/tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www"),
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": service},
    )
    room("wait", "--for=condition=Ready", "pod/web", "--timeout=90s")
    room("wait", "--for=jsonpath={.endpoints[0].conditions.ready}=true", "endpointslice", "-l", "kubernetes.io/service-name=web")
    address = room.read(".spec.clusterIP", "service", "web")
    for url in (f"http://{room.read('.status.podIP', 'pod', 'web')}:8080/", f"http://{address}/"):
        with urlopen(url, timeout=30) as answer:
            assert answer.read() == b"from the pod\n"

    assert address in room("exec", "web", "--", "nslookup", f"web.{room.namespace}.svc.cluster.local")
    request = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 20"
    assert "from the test" in room("exec", "web", "--", "sh", "-c", f"{request} {cluster.host} {server}")
    # Nothing beyond this machine is reachable: there is no route.
    with pytest.raises(RuntimeError):
        room("exec", "web", "--", "nc", "-w", "2", "192.0.2.1", "80")


def test_a_job_completes_on_a_claimed_volume_as_an_ordinary_user(room: Room) -> None:
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}
    volume = {"volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]}
    template = pod("x", "echo kept >/data/file && cat /data/file && id -u", restartPolicy="Never", **volume)
    template["spec"]["securityContext"] = {"runAsUser": 10001, "fsGroup": 10001}
    template["spec"]["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    job = {"template": {"spec": template["spec"]}, "backoffLimit": 0}
    room.make(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}, "spec": claim},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": job},
    )
    room("wait", "--for=condition=Complete", "job/job", "--timeout=90s")
    assert room("logs", "job/job").split() == ["kept", "10001"]


@ours
def test_the_suite_runs_on_the_cluster_of_any_kubeconfig(cluster: Any) -> None:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environ = {**ours, "DAGGER_TEST_KUBECONFIG": str(cluster.kubeconfig)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/cluster/test_cluster.py"]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    # What is about our own cluster is left out, and the given one is still there afterwards.
    assert re.search(r"1 passed, 5 skipped", done.stdout), done.stdout[-4000:]
    assert cluster.kubectl("get", "nodes", "-o", "name")


@ours
def test_a_control_plane_takes_the_programs_of_kubebuilder_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets, used = tmp_path / "assets", tmp_path / "used"
    assets.mkdir()
    for tool, program in (("etcd", "etcd"), ("kubernetes", "kube-apiserver"), ("kubernetes", "kubectl")):
        real = built(tool) if tool == program else built(tool, program)
        (assets / program).write_text(f'#!/bin/sh\necho {program} >>{used}\nexec {real} "$@"\n')
        (assets / program).chmod(0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets))
    (tmp_path / "state").mkdir()
    with started_control_plane(tmp_path / "state", 76) as kubernetes:
        assert kubernetes.kubectl("get", "daggerruns", "--all-namespaces", "-o", "name") == ""
    assert set(used.read_text().split()) == {"etcd", "kube-apiserver", "kubectl"}


BESIDE = str(128 + int(os.environ.get("DAGGER_CLUSTER", "0")))
"""Number of a separate cluster beside the session's."""


@pytest.fixture(scope="module")
def beside(cluster: Any) -> Iterator[dict[str, str]]:
    """The scripts' environment for a second cluster, in which a pod runs."""
    environ = {**os.environ, "DAGGER_CLUSTER": BESIDE}
    said = subprocess.run([HERE / "up"], env=environ, check=True, stdout=subprocess.PIPE, text=True).stdout
    second = replace(cluster, kubeconfig=Path(re.findall(r"KUBECONFIG=(\S+)", said)[0]))
    second.kubectl("run", "pod", "--image=localhost/busybox:1")
    second.kubectl("wait", "--for=condition=Ready", "pod/pod", "--timeout=90s")
    yield environ
    subprocess.run([HERE / "down"], env=environ, check=True)


def running(environ: dict[str, str], name: str) -> list[str]:
    return subprocess.run([HERE / "in", "pgrep", "-x", name], env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def inside_of(network: str) -> list[str]:
    """Return the processes in this network namespace, except those of pods with their own."""
    return [path.name for path in Path("/proc").glob("[0-9]*") if link(path / "ns" / "net") == network]


def link(path: Path) -> str | None:
    try:
        return str(path.readlink())
    except OSError:
        return None


def cgroups() -> list[Path]:
    return [path for pattern in ("", "*/") for path in Path("/sys/fs/cgroup").glob(f"{pattern}dagger-test-{BESIDE}")]


def place_of(environ: dict[str, str]) -> tuple[str, str, str, int]:
    """Return network and process namespaces of a running cluster, its folder, and its first process."""
    inside = [HERE / "in", "readlink", "/proc/1/ns/net", "/proc/1/ns/pid"]
    network, pids = subprocess.run(inside, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    show = f'source "{HERE}/lib.sh"; echo "$STATE" "$(first_process)"'
    folder, first = subprocess.run(["bash", "-c", show], env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return network, pids, folder, int(first)


def ctr(environ: dict[str, str], *arguments: str) -> list[str]:
    command = [HERE / "in", "ctr", "--namespace=k8s.io", *arguments]
    return subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


@ours
def test_an_api_server_that_was_killed_comes_back(beside: dict[str, str]) -> None:
    before = running(beside, "kube-apiserver")
    subprocess.run([HERE / "in", "kill", "-KILL", *before], env=beside, check=True)
    subprocess.run([HERE / "up"], env=beside, check=True, stdout=subprocess.DEVNULL)  # waits until it answers
    assert running(beside, "kube-apiserver") != before


@ours
def test_of_a_cluster_that_ends_or_is_killed_only_the_projects_images_are_left(beside: dict[str, str]) -> None:
    network, _, _, first = place_of(beside)
    assert len(inside_of(network)) > 8 and cgroups() and ctr(beside, "containers", "ls", "--quiet")
    kept, other = "docker.io/dagger-operator/kept:1", "localhost/other:1"
    ctr(beside, "images", "tag", "--force", "localhost/busybox:1", kept, other)

    os.kill(first, signal.SIGKILL)
    while Path(f"/proc/{first}").exists():
        time.sleep(0.05)
    subprocess.run([HERE / "up"], env=beside, check=True, stdout=subprocess.DEVNULL)
    images = ctr(beside, "images", "ls", "--quiet")
    assert kept in images and other not in images
    assert not ctr(beside, "containers", "ls", "--quiet")

    network, pids, folder, _ = place_of(beside)
    ctr(beside, "images", "rm", kept)
    subprocess.run([HERE / "down"], env=beside, check=True)
    assert not inside_of(network)
    assert not [path for path in Path("/proc").glob("[0-9]*") if link(path / "ns" / "pid") == pids]
    assert not cgroups()
    assert not Path(folder).exists()
    assert folder not in Path("/proc/mounts").read_text()
    assert not Path(f"/sys/class/net/dagger-test-{BESIDE}").exists()
    subprocess.run([HERE / "down"], env=beside, check=True)  # of nothing: nothing to do
