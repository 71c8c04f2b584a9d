"""What is a run's own, and what only wears its label. Pure.

A label may be written by anyone; an owner reference with the run's uid is ours. Pods are owned by what a controller made for them:
a Job, or a ReplicaSet of a Deployment.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from dagger_operator.api import DAggerRun

Manifest = Mapping[str, Any]


def controller(manifest: Manifest) -> Mapping[str, Any] | None:
    """The owner reference of the one object that controls this one."""
    return next((one for one in manifest["metadata"].get("ownerReferences") or () if one.get("controller")), None)


def is_own(run: DAggerRun, manifest: Manifest) -> bool:
    """Whether an object is this run's, and not an earlier run's of the same name."""
    owner = controller(manifest)
    return owner is not None and owner.get("uid") == run.metadata.uid


def own(run: DAggerRun, labelled: Iterable[Manifest]) -> tuple[list[Manifest], list[Manifest]]:
    """Of everything that wears a run's label: its objects, and its pods, which may outlive their objects."""
    here = [one for one in labelled if one["metadata"].get("namespace") == run.metadata.namespace]
    objects: list[Manifest] = []
    strangers: list[Manifest] = []
    pods: list[Manifest] = []
    for one in here:
        (pods if one["kind"] == "Pod" else objects if is_own(run, one) else strangers).append(one)
    return objects, [pod for pod in pods if _is_own_pod(run, pod, objects, strangers)]


def _is_own_pod(run: DAggerRun, pod: Manifest, objects: Iterable[Manifest], strangers: Iterable[Manifest]) -> bool:
    """A pod whose object is unknown counts as ours where it may be: what might hold GPUs is waited for."""
    maker = controller(pod)
    if maker is None or not maker["name"].startswith(f"{run.metadata.name}-"):
        return False
    if maker["kind"] == "ReplicaSet":
        name = maker["name"].rpartition("-")[0]
        known = {one["metadata"]["name"] for one in objects if one["kind"] == "Deployment"}
        foreign = {one["metadata"]["name"] for one in strangers if one["kind"] == "Deployment"}
        return name in known or name not in foreign
    return maker["uid"] not in {one["metadata"].get("uid") for one in strangers}
