"""Interprets a sandbox pod's status: ready, on its way and why not yet, or ended and why."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dagger_operator.sandbox.pod_manifest import CONTAINER, WORKDIR_VOLUME

Json = dict[str, Any]

_USUAL = ("ContainerCreating", "PodInitializing", "")
_PULLING = ("ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "ImageInspectError")
_OWN_LIMITS = (
    "Pod ephemeral local storage usage exceeds the total limit of containers",
    f"Container {CONTAINER} exceeded its local ephemeral storage limit",
    f'Usage of EmptyDir volume "{WORKDIR_VOLUME}" exceeds the limit',
)
"""How the kubelet's message begins if it evicted a pod for the pod's own usage; otherwise the node ran out of something."""
_HOPELESS = ("InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError", "CreateContainerError")


class Stand(StrEnum):
    COMING = "Coming"
    STUCK = "Stuck"
    """Its image cannot be pulled yet; the registry may recover."""
    READY = "Ready"
    ENDED = "Ended"
    """Over, or certain never to start."""


@dataclass(frozen=True)
class PodState:
    stand: Stand
    reason: str
    """Kubernetes' own reason; empty if nothing is wrong."""
    message: str
    """In words; while the pod is on its way, what it waits for, as far as its kubelet reports that."""
    address: str = ""
    """IP address, as soon as it has one."""
    exceeded: bool = False
    """Whether one of its own limits ended it: the cause is what ran in it."""


def state_of(pod: Json) -> PodState:
    """Return the state of a pod as the API server returns it. Pure."""
    status = pod.get("status") or {}
    if status.get("phase") == "Failed" and _exceeded(status):
        return PodState(Stand.ENDED, *_end(status), exceeded=True)
    if pod["metadata"].get("deletionTimestamp"):
        return PodState(Stand.ENDED, *(_disruption(status) or ("PodDeleted", "the pod was deleted")))
    if status.get("phase") in ("Failed", "Succeeded"):
        return PodState(Stand.ENDED, *_end(status))
    creating = ""
    for container in _containers(status):
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") == "ContainerCreating":
            creating = creating or f"container {container['name']} is being made: its image is pulled, or a volume mounted"
        reason, message = waiting.get("reason") or "", waiting.get("message") or f"container {container['name']}"
        if reason not in _USUAL:
            stand = Stand.ENDED if reason in _HOPELESS else Stand.STUCK if reason in _PULLING else Stand.COMING
            return PodState(stand, reason, message)
        if container["name"] == CONTAINER and "running" in (container.get("state") or {}) and status.get("podIP"):
            return PodState(Stand.READY, "", "", status["podIP"])
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return PodState(Stand.COMING, scheduled.get("reason") or "Unschedulable", scheduled.get("message") or "")
    return PodState(Stand.COMING, "", creating, status.get("podIP") or "")


def _exceeded(status: Json) -> bool:
    if status.get("reason"):
        return status["reason"] == "Evicted" and (status.get("message") or "").startswith(_OWN_LIMITS)
    # If the kernel kills the whole container for what one command uses, as with cgroup v2.
    ended = [(one.get("state") or {}).get("terminated") or {} for one in _containers(status) if one["name"] == CONTAINER]
    return _disruption(status) is None and any(one.get("reason") == "OOMKilled" for one in ended)


def _end(status: Json) -> tuple[str, str]:
    if status.get("reason"):
        return status["reason"], status.get("message") or ""
    if disrupted := _disruption(status):
        return disrupted
    for container in _containers(status):
        ended = (container.get("state") or {}).get("terminated") or {}
        if ended and (ended.get("exitCode") != 0 or container["name"] == CONTAINER):
            said = ended.get("message") or f"container {container['name']} ended with exit code {ended.get('exitCode')}"
            return ended.get("reason") or "Error", said
    return "PodEnded", f"the pod ended as {status.get('phase')}"


def _disruption(status: Json) -> tuple[str, str] | None:
    condition = _condition(status, "DisruptionTarget")
    if condition.get("status") != "True":
        return None
    return condition.get("reason") or "Disrupted", condition.get("message") or ""


def _condition(status: Json, kind: str) -> Json:
    return next((one for one in status.get("conditions") or () if one.get("type") == kind), {})


def _containers(status: Json) -> Iterator[Json]:
    yield from status.get("initContainerStatuses") or ()
    yield from status.get("containerStatuses") or ()
