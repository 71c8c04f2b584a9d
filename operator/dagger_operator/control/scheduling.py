"""Applies what users set on pods (`PodSettings`) to a pod template."""

from collections.abc import Iterable, Mapping
from typing import Any

from dagger_operator.api import ClaimMount, Kueue, PodSettings

Json = dict[str, Any]

QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"


def queue_labels(kueue: Kueue | None) -> dict[str, str]:
    """Return the labels by which Kueue admits a Job or a server."""
    if kueue is None:
        return {}
    return {QUEUE: kueue.queue_name, **({PRIORITY: kueue.priority_class} if kueue.priority_class else {})}


def pod_template(labels: Mapping[str, str], spec: Json, settings: PodSettings, *, main: str, claims: Iterable[ClaimMount] = ()) -> Json:
    """Return a template with a user's settings. Resources apply to the container `main`; every container mounts the claims of the settings
    and of `claims`."""
    mounted = {claim.mount_path: claim for claim in (*claims, *settings.claims)}
    names = {path: f"claim-{index}" for index, path in enumerate(mounted)}
    mounts = [{"name": names[path], "mountPath": path, "readOnly": claim.read_only} for path, claim in mounted.items()]
    spec = {**spec, **_scheduling(settings)}
    for kind in ("initContainers", "containers"):
        if kind in spec:
            spec[kind] = [_container(one, settings if one["name"] == main else None, mounts) for one in spec[kind]]
    spec["volumes"] = [
        *(_bounded(volume, settings.shared_memory_mib) for volume in spec["volumes"]),
        *(
            {"name": names[path], "persistentVolumeClaim": {"claimName": claim.claim_name, "readOnly": claim.read_only}}
            for path, claim in mounted.items()
        ),
    ]
    metadata: Json = {"labels": {**settings.labels, **labels}}
    if settings.annotations:
        metadata["annotations"] = dict(settings.annotations)
    return {"metadata": metadata, "spec": spec}


def _scheduling(settings: PodSettings) -> Json:
    """Return the fields of a pod's spec that settings hold in Kubernetes' own form; empty ones are left out."""
    wire = settings.wire()
    fields = (
        *("nodeSelector", "tolerations", "affinity", "topologySpreadConstraints", "priorityClassName", "runtimeClassName"),
        *("schedulerName", "imagePullSecrets", "serviceAccountName"),
    )
    return {field: wire[field] for field in fields if wire.get(field)}


def _container(container: Json, settings: PodSettings | None, mounts: list[Json]) -> Json:
    changed = {**container, "volumeMounts": [*container["volumeMounts"], *mounts]}
    if settings is not None:
        own = container.get("resources", {})
        given = {"requests": settings.resources.requests, "limits": settings.resources.limits}
        merged = {kind: {**own.get(kind, {}), **amounts} for kind, amounts in given.items()}
        # A request above its limit would be refused.
        merged["requests"] = {
            name: amount for name, amount in merged["requests"].items() if name in given["requests"] or name not in given["limits"]
        }
        if resources := {kind: amounts for kind, amounts in merged.items() if amounts}:
            changed["resources"] = resources
    return changed


def _bounded(volume: Json, shared_memory_mib: int | None) -> Json:
    if volume["name"] != "shm" or shared_memory_mib is None:
        return volume
    return {**volume, "emptyDir": {**volume["emptyDir"], "sizeLimit": f"{shared_memory_mib}Mi"}}
