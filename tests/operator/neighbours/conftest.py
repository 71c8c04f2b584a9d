"""A control plane with LeaderWorkerSet and Kueue in it, the real controllers with their webhooks, for tests that need no node."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from fixtures.kubernetes import Kubernetes, patiently, started_control_plane
from fixtures.tools import built

HERE = "127.0.0.1"
# Kueue looks for a certificate of its metrics in a fixed place, even where it serves none.
WITH_CERTIFICATE = ["unshare", "--map-root-user", "--mount", "bash", "-c"]
WITH_CERTIFICATE += ['mount -t tmpfs etc /etc && mkdir -p /etc/kueue/metrics && ln -s "$0" /etc/kueue/metrics/certs && exec "$@"']


@pytest.fixture(scope="package")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    """One of their own: webhooks of others in it are nothing for other tests."""
    folder = tmp_path_factory.mktemp("neighbours")
    with ExitStack() as stack:
        control_plane = stack.enter_context(started_control_plane(folder, loopback=78))
        certificate = _certificate(folder)
        for name, crds, webhooks, settings in (
            ("lws", "config/crd/bases", "config/webhook/manifests.yaml", _lws),
            ("kueue", "config/components/crd/bases", "config/components/webhook/manifests.yaml", _kueue),
        ):
            product = built(name)
            control_plane.kubectl("apply", "--server-side", "-f", product / crds)
            patiently(lambda crds=product / crds: control_plane.kubectl("wait", "--for=condition=Established", "-f", crds))
            port = _free_port()
            config = folder / f"{name}.yaml"
            config.write_text(yaml.safe_dump(settings({"host": HERE, "port": port, "certDir": str(folder)})))
            command = [*WITH_CERTIFICATE, folder, product / name, f"--config={config}"]
            stack.enter_context(_running(command, control_plane, folder / f"{name}.log", port))
            control_plane.kubectl("apply", "-f", "-", input=_webhooks(product / webhooks, name, port, certificate))
        yield control_plane


def _lws(webhook: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "config.lws.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "health": {"healthProbeBindAddress": "0"},
        "metrics": {"bindAddress": "0"},
        "webhook": webhook,
    }


def _kueue(webhook: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "health": {"healthProbeBindAddress": "0"},
        "metrics": {"bindAddress": "0"},
        "webhook": webhook,
        "integrations": {"frameworks": ["batch/job", "pod", "deployment", "leaderworkerset.x-k8s.io/leaderworkerset"]},
        "featureGates": {"VisibilityOnDemand": False},
    }


def _certificate(folder: Path) -> str:
    """Of webhooks at `HERE`, as tls.crt and tls.key; in base64, its own authority."""
    ask = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"]
    names = ["-subj", "/CN=webhooks", "-addext", f"subjectAltName=IP:{HERE}"]
    subprocess.run([*ask, *names, "-keyout", folder / "tls.key", "-out", folder / "tls.crt"], check=True, capture_output=True)
    encoded = subprocess.run(["base64", "-w0", folder / "tls.crt"], check=True, stdout=subprocess.PIPE, text=True)
    return encoded.stdout


def _webhooks(manifests: Path, name: str, port: int, certificate: str) -> str:
    """A controller's own webhooks, as a process beside the API server answers them; those of kinds that nobody has here are left out."""
    documents = [one for one in yaml.safe_load_all(manifests.read_text()) if one]
    for one in documents:
        one["metadata"]["name"] = f"{name}-{one['metadata']['name']}"
        for webhook in one["webhooks"]:
            path = webhook["clientConfig"]["service"]["path"]
            webhook["clientConfig"] = {"url": f"https://{HERE}:{port}{path}", "caBundle": certificate}
            webhook["namespaceSelector"] = {
                "matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["kube-system"]}]
            }
    return yaml.safe_dump_all(documents)


@contextmanager
def _running(command: list[str | Path], control_plane: Kubernetes, log: Path, port: int) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen([*command, f"--kubeconfig={control_plane.kubeconfig}"], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not answer: {log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HERE, port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HERE, 0))
        return int(probe.getsockname()[1])
