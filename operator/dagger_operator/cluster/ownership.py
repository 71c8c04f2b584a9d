"""What belongs to a run, and what only has its label. Pure.

Anyone may write a label; an owner reference with the run's uid is ours. Pods are owned by what a controller created for them: a Job, a
ReplicaSet of a Deployment, or the StatefulSets of a LeaderWorkerSet.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dagger_operator.api import DAggerRun, Role
from dagger_operator.control import ATTEMPT, COMPONENT
from dagger_operator.control.names import group_name, job_name, round_of, server_name

Manifest = Mapping[str, Any]


def controller(manifest: Manifest) -> Mapping[str, Any] | None:
    """Return the owner reference of the one object that controls this one."""
    return next((one for one in manifest["metadata"].get("ownerReferences") or () if one.get("controller")), None)


def is_own(run: DAggerRun, manifest: Manifest) -> bool:
    """Whether an object is this run's, and not an earlier run's of the same name."""
    owner = controller(manifest)
    return owner is not None and owner.get("uid") == run.metadata.uid


def own(run: DAggerRun, labelled: Iterable[Manifest]) -> tuple[list[Manifest], list[Manifest]]:
    """Return the run's objects among everything with its label, and its pods, which may outlive their objects."""
    here = [one for one in labelled if one["metadata"].get("namespace") == run.metadata.namespace]
    objects: list[Manifest] = []
    strangers: list[Manifest] = []
    pods: list[Manifest] = []
    for one in here:
        (pods if one["kind"] == "Pod" else objects if is_own(run, one) else strangers).append(one)
    return objects, [pod for pod in pods if _is_own_pod(run, pod, objects, strangers)]


def _is_own_pod(run: DAggerRun, pod: Manifest, objects: Iterable[Manifest], strangers: Iterable[Manifest]) -> bool:
    """Whether a pod is the run's. A pod whose object is unknown counts as ours if only we would use that name: anything that may hold GPUs
    is waited for."""
    maker = controller(pod)
    if maker is None:
        return False
    kind, name = maker["kind"], maker["name"]
    if kind == "Job":
        if maker["uid"] in {one["metadata"].get("uid") for one in objects}:
            return True
        return name == _job_of(run, pod) and maker["uid"] not in {one["metadata"].get("uid") for one in strangers}
    if kind not in _MADE_FOR:
        return False
    server, suffix, named = _MADE_FOR[kind]
    name = re.sub(suffix, "", name)
    known = {one["metadata"]["name"] for one in objects if one["kind"] == server}
    foreign = {one["metadata"]["name"] for one in strangers if one["kind"] == server}
    return name in {named(run, role) for role in Role} and (name in known or name not in foreign)


_MADE_FOR = {"ReplicaSet": ("Deployment", r"-[^-]*$", server_name), "StatefulSet": ("LeaderWorkerSet", r"-[0-9]+$", group_name)}
"""By kind of what creates a server's pods: the kind that it belongs to, the suffix of its name, and how we name the server."""


def _job_of(run: DAggerRun, pod: Manifest) -> str:
    """Return the name of the Job that a pod's labels state."""
    labels = pod["metadata"].get("labels") or {}
    return job_name(run, labels.get(COMPONENT, ""), round_of(labels), labels.get(ATTEMPT, ""))
