"""The chart, rendered by the real Helm."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "dagger-operator"
Json = dict[str, Any]
Helm = Callable[..., "subprocess.CompletedProcess[str]"]
Render = Callable[..., list[Json]]


class Refused(Exception):
    """Helm ended with an error; the message is Helm's."""


@pytest.fixture(scope="session")
def helm() -> Helm:
    """Runs Helm, built once for this machine. Raises `Refused`."""
    build = subprocess.run([sys.executable, ROOT / "scripts" / "build-tool", "helm"], stdout=subprocess.PIPE, text=True, check=True)
    program = build.stdout.strip()

    def call(*arguments: str | Path, input: str | None = None) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run([program, *arguments], input=input, capture_output=True, text=True, timeout=240)
        if done.returncode:
            raise Refused(done.stderr)
        return done

    return call


@pytest.fixture(scope="session")
def render(helm: Helm) -> Render:
    """The chart's objects for some values, the pod of `helm test` included; `apis`: what the cluster serves beside Kubernetes' own."""

    def call(values: Mapping[str, Any] | None = None, *, apis: tuple[str, ...] = ()) -> list[Json]:
        arguments = ["template", "dagger-operator", CHART, "--namespace", "dagger-system", "--kube-version", "1.34", "--values", "-"]
        for api in apis:
            arguments += ["--api-versions", api]
        return [one for one in yaml.load_all(helm(*arguments, input=json.dumps(values or {})).stdout, yaml.CSafeLoader) if one]

    return call


@pytest.fixture(scope="session")
def pods() -> Callable[[list[Json]], Iterator[Json]]:
    """The specs of all pods that the objects make."""

    def call(objects: list[Json]) -> Iterator[Json]:
        for one in objects:
            if one["kind"] in ("Deployment", "Pod"):
                yield one["spec"]["template"]["spec"] if one["kind"] == "Deployment" else one["spec"]

    return call


@dataclass(frozen=True)
class Release:
    """The chart on a real API server, for one namespace of runs."""

    helm: Callable[..., "subprocess.CompletedProcess[str]"]
    kubectl: Callable[..., "subprocess.CompletedProcess[str]"]
    """Raises nothing: a refusal is an answer. Warnings are on stderr."""
    system: str
    runs: str
    sandboxes: str

    @property
    def operator(self) -> str:
        return f"system:serviceaccount:{self.system}:dagger-operator"

    def create(self, manifest: Json, *, user: str | None = None, keep: bool = False) -> "subprocess.CompletedProcess[str]":
        """What a user is told who makes an object; a dry run unless it is kept."""
        arguments = ["create", "-f", "-", *([] if keep else ["--dry-run=server"]), *(["--as", user] if user else [])]
        return self.kubectl(*arguments, input=json.dumps(manifest))


@pytest.fixture(scope="module")
def release(helm: Helm, control_plane: Any) -> Iterator[Release]:
    """Installed beside the control plane's own CRD. Admission policies stand alone: pod security, which speaks first, is off."""

    def kubectl(*arguments: str | Path, input: str | None = None) -> "subprocess.CompletedProcess[str]":
        command = [control_plane.program, f"--kubeconfig={control_plane.kubeconfig}", *arguments]
        return subprocess.run(command, input=input, capture_output=True, text=True, timeout=120)

    with control_plane.fresh_namespace() as system, control_plane.fresh_namespace() as runs:
        sandboxes = f"{runs}-sandboxes"

        def on_it(*arguments: str | Path, **more: Any) -> "subprocess.CompletedProcess[str]":
            return helm("--kubeconfig", control_plane.kubeconfig, "--namespace", system, *arguments, **more)

        values = {
            "crds": {"install": False},
            "watchNamespaces": [runs],
            "sandbox": {"namespace": sandboxes, "podSecurity": {"enforce": "privileged"}},
        }
        on_it("install", "dagger-operator", CHART, "--values", "-", input=json.dumps(values))
        installed = Release(on_it, kubectl, system, runs, sandboxes)
        try:
            kubectl("wait", "--for=create", "serviceaccount/default", f"--namespace={sandboxes}", "--timeout=60s")
            wait_until_policies_are_known(installed)
            yield installed
        finally:
            on_it("uninstall", "dagger-operator")


def wait_until_policies_are_known(release: Release) -> None:
    """An API server reads new policies every second or so, one after the other."""
    bare = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "bare", "namespace": release.sandboxes},
        "spec": {"containers": [{"name": "a", "image": "a"}]},
    }
    labelled = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "a", "namespace": release.runs, "labels": {"app.kubernetes.io/managed-by": "dagger-operator"}},
    }
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if all("ValidatingAdmissionPolicy" in release.create(one).stderr for one in (bare, labelled)):
            return
        time.sleep(0.2)
    raise RuntimeError("the API server does not know the chart's admission policies")
