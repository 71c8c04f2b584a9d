"""The manifest of a sandbox pod: confined by what Kubernetes offers, and named so that a second try finds what the first one left."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from dagger_operator.api import SandboxLimits, SandboxPod
from dagger_operator.sandbox.interface import SandboxError, SandboxRequest

Json = dict[str, Any]

CONTAINER = "sandbox"
HELPER_PORT = 7070
HELPER = "/dagger/sandboxd"
WORKDIR_VOLUME = "workdir"
MANAGED_BY = {"app.kubernetes.io/managed-by": "dagger-operator", "app.kubernetes.io/component": "sandbox"}
_SLACK_MIB = 64
"""Memory for the helper, so that it can measure and stop a command before the kernel kills the whole pod."""
_REQUESTED = 0.25
"""Fraction of its limits that a sandbox requests: an agent waits for its policy most of the time."""


@dataclass(frozen=True)
class Setting:
    """What all sandbox pods of a worker have in common."""

    run: str
    run_namespace: str
    worker: str
    life: str
    """8 hex digits, unique to this worker's pod."""
    helper_image: str
    """Image with `/opt/dagger/sandboxd`."""
    limits: SandboxLimits
    lifetime_seconds: int
    """After this many seconds a sandbox ends, even if it was forgotten."""
    image: str | None = None
    """For requests without an image."""
    pod: SandboxPod = field(default_factory=SandboxPod)

    @property
    def labels(self) -> dict[str, str]:
        run = {"dagger-operator.dev/run": self.run, "dagger-operator.dev/run-namespace": self.run_namespace}
        return {**MANAGED_BY, **run, "dagger-operator.dev/worker": self.worker}

    @property
    def run_selector(self) -> str:
        """Selects everything of the run, of any worker."""
        return _selector({key: value for key, value in self.labels.items() if key != "dagger-operator.dev/worker"})

    @property
    def worker_selector(self) -> str:
        return _selector(self.labels)

    @property
    def lease_name(self) -> str:
        return _name(f"{self.run}-{self.worker}", self.life)


def of_a_worker(pod: Json) -> bool:
    """Whether a worker created a pod. Anybody can write labels, so they prove nothing; what a worker creates is owned by a Lease."""
    return any(owner["kind"] == "Lease" for owner in pod["metadata"].get("ownerReferences") or ())


def _selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _name(words: str, digits: str) -> str:
    """Return a name of at most 63 characters: as many of the words as fit, then the digits that make it unique."""
    plain = re.sub("[^a-z0-9]+", "-", words.lower())[: 62 - len(digits)].strip("-")
    return f"{plain or 'sandbox'}-{digits}"


def pod_name(setting: Setting, request: SandboxRequest) -> str:
    """Return the pod's name, the same for the same request; runs of several namespaces share the sandbox namespace."""
    return _name(request.name, sha256(f"{setting.run_namespace}/{request.name}".encode()).hexdigest()[:10])


def pod(setting: Setting, request: SandboxRequest, *, digest: str, owner: Json) -> Json:
    """Return the manifest. `digest`: SHA-256 of the sandbox's token; `owner`: worker's Lease. Raises `SandboxError` without an image."""
    image = request.image or setting.image
    if image is None:
        raise SandboxError("NoImage", f"sandbox {request.name}: its task names no image; set spec.sandbox.image for such tasks")
    labels = dict(setting.labels)
    if request.network_to is not None:
        labels["dagger-operator.dev/network"] = "gateway"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod_name(setting, request),
            "labels": labels,
            "annotations": {"dagger-operator.dev/sandbox": request.name},
            "ownerReferences": [
                {
                    "apiVersion": "coordination.k8s.io/v1",
                    "kind": "Lease",
                    "name": owner["metadata"]["name"],
                    "uid": owner["metadata"]["uid"],
                    # A pod without a controller stops `kubectl drain`.
                    "controller": True,
                }
            ],
        },
        "spec": {
            **_wishes(setting.pod),
            "restartPolicy": "Never",
            "activeDeadlineSeconds": setting.lifetime_seconds,
            # The helper does not shut down on request: a command could send one.
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            # No cluster DNS, so that a command's name lookup fails immediately.
            "dnsPolicy": "None",
            "dnsConfig": {"nameservers": ["127.0.0.1"]},
            "hostname": CONTAINER,
            "securityContext": _user(setting.pod) | {"seccompProfile": {"type": "RuntimeDefault"}},
            "initContainers": [_installer(setting)],
            "containers": [_sandbox(setting, request, image, digest)],
            "volumes": [{"name": "dagger", "emptyDir": {"sizeLimit": "64Mi"}}, *_workdir_volumes(setting, request)],
        },
    }


def _wishes(pod: SandboxPod) -> Json:
    """Return what the run specifies for its sandbox pods; the API uses Kubernetes' own field names."""
    return {key: value for key, value in pod.wire().items() if key != "runAsUser" and value not in ({}, [])}


def _user(pod: SandboxPod) -> Json:
    user = pod.run_as_user
    return {} if user is None else {"runAsUser": user, "runAsGroup": user, "fsGroup": user, "runAsNonRoot": user != 0}


_CONFINED: Json = {"allowPrivilegeEscalation": False, "privileged": False, "capabilities": {"drop": ["ALL"]}}


def _installer(setting: Setting) -> Json:
    return {
        "name": "helper",
        "image": setting.helper_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["/opt/dagger/sandboxd", "install", "/dagger"],
        "resources": {
            "requests": {"cpu": "10m", "memory": "16Mi", "ephemeral-storage": "16Mi"},
            "limits": {"cpu": "1", "memory": "64Mi", "ephemeral-storage": "64Mi"},
        },
        "securityContext": {**_CONFINED, "readOnlyRootFilesystem": True},
        "volumeMounts": [{"name": "dagger", "mountPath": "/dagger"}],
    }


def _sandbox(setting: Setting, request: SandboxRequest, image: str, digest: str) -> Json:
    limits = setting.limits
    options = [f"-processes={limits.processes}", f"-memory-mib={limits.memory_mib}", f"-file-mib={limits.disk_mib}"]
    if request.network_to is not None:
        options.append(f"-forward={request.network_to}")
    return {
        "name": CONTAINER,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": [HELPER, "serve", *options],
        # For the helper only; commands inherit none of it.
        "env": [{"name": "DAGGER_TOKEN_SHA256", "value": digest}],
        "ports": [{"name": "helper", "containerPort": HELPER_PORT}],
        "resources": {
            "requests": _amounts(limits.cpus * _REQUESTED, limits.memory_mib * _REQUESTED, limits.disk_mib * _REQUESTED),
            "limits": _amounts(limits.cpus, limits.memory_mib + _SLACK_MIB, limits.disk_mib + 64),
        },
        "securityContext": _CONFINED,
        # Read-only, so that no command can replace the helper.
        "volumeMounts": [
            {"name": "dagger", "mountPath": "/dagger", "readOnly": True},
            *({"name": volume["name"], "mountPath": request.workdir} for volume in _workdir_volumes(setting, request)),
        ],
    }


def _workdir_volumes(setting: Setting, request: SandboxRequest) -> list[Json]:
    """A task without its own image starts in an empty folder, writable for whichever user the image runs as."""
    return [] if request.image else [{"name": WORKDIR_VOLUME, "emptyDir": {"sizeLimit": f"{setting.limits.disk_mib}Mi"}}]


def _amounts(cpus: float, memory_mib: float, disk_mib: float) -> dict[str, str]:
    cpu, memory, disk = max(1, round(cpus * 1000)), max(1, round(memory_mib)), max(1, round(disk_mib))
    return {"cpu": f"{cpu}m", "memory": f"{memory}Mi", "ephemeral-storage": f"{disk}Mi"}
