"""What is observed, in the few words that the plan decides by.

Pure: Kubernetes-form objects and pods go in, from an API server or from the local runtime, and `Child`ren come out. A child
mirrors its pods' own reasons, so that a condition can say why a run waits without anyone looking at pods.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from dagger_operator.control import names
from dagger_operator.control.names import Ref
from dagger_operator.control.results import Results
from dagger_operator.store.stage import ExitCode

Manifest = Mapping[str, Any]

SERVER_RESTARTS = 5
"""A server that is in back-off after this many restarts is given up."""


class ChildState(StrEnum):
    WAITING = "Waiting"
    """Nothing of it runs yet."""
    RUNNING = "Running"
    """A Job whose pods run; a Deployment that is on its way."""
    READY = "Ready"
    """A Deployment with all replicas ready; anything else that exists."""
    SUSPENDED = "Suspended"
    """A suspended Job; a Deployment scaled to zero."""
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


@dataclass(frozen=True)
class Trouble:
    """Why something waits or failed, in the words of the one who knows."""

    reason: str
    message: str = ""
    since: datetime | None = None


@dataclass(frozen=True)
class Child:
    """One object of a run, or pods whose object is gone."""

    kind: str
    name: str
    component: str
    round: int = 0
    attempt: str = ""
    state: ChildState = ChildState.READY
    pods: int = 0
    """Pods that exist and have not ended, terminating ones included: they may hold GPUs."""
    trouble: Trouble | None = None
    finished: datetime | None = None
    """When a Job ended."""
    api_version: str = ""
    uid: str = ""
    deleting: bool = False

    @property
    def holds(self) -> bool:
        """Whether it has pods, or may be given some at any moment by the controller that works on it."""
        at_rest = {"Job": (ChildState.SUCCEEDED, ChildState.FAILED), "Deployment": (ChildState.SUSPENDED, ChildState.FAILED)}
        return self.pods > 0 or (self.kind in at_rest and self.state not in at_rest[self.kind])

    @property
    def ref(self) -> Ref:
        return Ref(self.api_version, self.kind, self.name, self.uid)


@dataclass(frozen=True)
class Observed:
    """All that a plan rests on beside the run itself. A view of children may be a moment old, but shows what this controller itself
    wrote. Read children first, then results: a finished Job's result is then seen."""

    now: datetime
    children: tuple[Child, ...] = ()
    results: Results = field(default_factory=Results)
    storage_problem: str | None = None
    """Set where results could not be read: then nothing is known about progress, and nothing is started or thrown away."""


def children(objects: Iterable[Manifest], pods: Iterable[Manifest]) -> tuple[Child, ...]:
    """The children that a run's objects and pods are. Pods without an object (its deletion was quicker) are children of kind Pod."""
    objects, unclaimed = list(objects), list(pods)
    found = []
    for manifest in objects:
        own = [pod for pod in unclaimed if _owns(manifest, pod)]
        unclaimed = [pod for pod in unclaimed if pod not in own]
        found.append(child(manifest, own))
    found += [child(pod, [pod]) for pod in unclaimed if _lives(pod)]
    return tuple(sorted(found, key=lambda one: (one.kind, one.name)))


def child(manifest: Manifest, pods: Sequence[Manifest] = ()) -> Child:
    """One object with its own pods."""
    metadata, kind = manifest["metadata"], manifest["kind"]
    labels = metadata.get("labels") or {}
    attempt = labels.get(names.ATTEMPT, "")
    # Pods of an earlier template say nothing about this one, but they hold what they hold.
    current = [pod for pod in pods if not attempt or (pod["metadata"].get("labels") or {}).get(names.ATTEMPT) == attempt]
    state, trouble, finished = ChildState.READY, None, None
    alive = sum(map(_lives, pods))
    if kind == "Job":
        state, trouble, finished = _job(manifest, current)
        alive = max(alive, int(_status(manifest).get("active") or 0) + int(_status(manifest).get("terminating") or 0))
    elif kind == "Deployment":
        state, trouble = _deployment(manifest, current)
        alive = max(alive, int(_status(manifest).get("replicas") or 0))
    elif kind == "Pod":
        state, trouble = ChildState.RUNNING, _waiting(pods)
    return Child(
        kind=kind,
        name=metadata["name"],
        component=labels.get(names.COMPONENT, ""),
        round=int(labels.get(names.ROUND, 0)),
        attempt=attempt,
        state=state,
        pods=alive,
        trouble=trouble,
        finished=finished,
        api_version=manifest.get("apiVersion", ""),
        uid=metadata.get("uid", ""),
        deleting=metadata.get("deletionTimestamp") is not None,
    )


def _owns(manifest: Manifest, pod: Manifest) -> bool:
    """By labels: a Deployment's pods are owned by ReplicaSets that nobody here looks at."""
    keys = {"Job": (names.COMPONENT, names.ROUND, names.ATTEMPT), "Deployment": (names.COMPONENT,)}.get(manifest["kind"])
    ours, theirs = manifest["metadata"].get("labels") or {}, pod["metadata"].get("labels") or {}
    return keys is not None and all(ours.get(key) == theirs.get(key) for key in keys)


def _job(manifest: Manifest, pods: Sequence[Manifest]) -> tuple[ChildState, Trouble | None, datetime | None]:
    complete, failed = _true(manifest, "Complete", "SuccessCriteriaMet"), _true(manifest, "Failed", "FailureTarget")
    if complete:
        return ChildState.SUCCEEDED, None, _time(complete.get("lastTransitionTime"))
    if failed:
        said = _last_words(pods) or Trouble(failed.get("reason") or "JobFailed", failed.get("message") or "")
        return ChildState.FAILED, said, _time(failed.get("lastTransitionTime"))
    if manifest["spec"].get("suspend"):
        return ChildState.SUSPENDED, None, None
    if any(_phase(pod) == "Running" for pod in pods):
        return ChildState.RUNNING, _waiting(pods), None
    # Between two tries, why the last one failed is why it waits.
    return ChildState.WAITING, _waiting(pods) or _last_words(pods), None


def _deployment(manifest: Manifest, pods: Sequence[Manifest]) -> tuple[ChildState, Trouble | None]:
    given_up = (manifest["metadata"].get("annotations") or {}).get(names.FAILED)
    if given_up is not None:
        return ChildState.FAILED, _stated(given_up) or Trouble("ServerFailed", given_up)
    status, wanted = _status(manifest), manifest["spec"].get("replicas", 1)
    if wanted == 0:
        return ChildState.SUSPENDED, None
    waiting = _waiting(pods)
    if (broken := _broken_server(pods)) is not None:
        return ChildState.FAILED, broken
    late = next((c for c in status.get("conditions") or () if c["type"] == "Progressing" and c["status"] == "False"), None)
    # A pod that no node has room for has not failed: it waits for its turn.
    if late and late.get("reason") == "ProgressDeadlineExceeded" and not (waiting and waiting.reason in _NOT_ITS_FAULT):
        return ChildState.FAILED, _last_words(pods) or waiting or Trouble("ProgressDeadlineExceeded", late.get("message") or "")
    seen = status.get("observedGeneration", 0) >= manifest["metadata"].get("generation", 0)
    if seen and wanted == status.get("updatedReplicas") == status.get("readyReplicas") == status.get("replicas"):
        return ChildState.READY, None
    return (ChildState.WAITING if waiting else ChildState.RUNNING), waiting


_NOT_ITS_FAULT = frozenset({"Unschedulable", "SchedulingGated"})


def _broken_server(pods: Sequence[Manifest]) -> Trouble | None:
    for pod in pods:
        for container in _containers(pod):
            ended = _ended(container)
            if ended is None:
                continue
            waiting = (container.get("state") or {}).get("waiting") or {}
            looping = waiting.get("reason") == "CrashLoopBackOff" and container.get("restartCount", 0) >= SERVER_RESTARTS
            if ended.get("exitCode") == ExitCode.PERMANENT or looping:
                return _explained(container, ended)
    return None


def _waiting(pods: Sequence[Manifest]) -> Trouble | None:
    """The first reason, in order of pods' names, for which a pod does not run."""
    for pod in sorted(pods, key=lambda one: str(one["metadata"]["name"])):
        if not _lives(pod):
            continue
        for condition in _status(pod).get("conditions") or ():
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return Trouble(condition.get("reason") or "Unschedulable", _at(pod, condition), _time(condition.get("lastTransitionTime")))
        for container in _containers(pod):
            waiting = (container.get("state") or {}).get("waiting") or {}
            reason = waiting.get("reason", "")
            if not reason or reason in ("PodInitializing", "ContainerCreating"):
                continue
            since = _time(pod["metadata"].get("creationTimestamp"))
            if (ended := _ended(container)) is not None:
                return Trouble(reason, f"{_at(pod, waiting)}; it ended with: {_explained(container, ended).message}", since)
            return Trouble(reason, _at(pod, waiting), since)
    return None


def _last_words(pods: Sequence[Manifest]) -> Trouble | None:
    """What the container that failed last left as its termination message."""
    failures = [
        (str(ended.get("finishedAt") or ""), container, ended)
        for pod in pods
        for container in _containers(pod)
        if (ended := _ended(container)) is not None and ended.get("exitCode") != ExitCode.DONE
    ]
    if not failures:
        return None
    # A failure that a retry cannot mend explains more than the pods that were stopped because of it.
    _, container, ended = max(failures, key=lambda failure: (failure[2].get("exitCode") == ExitCode.PERMANENT, failure[0]))
    return _explained(container, ended)


def _explained(container: Manifest, ended: Manifest) -> Trouble:
    said = str(ended.get("message") or "").strip()
    if (stated := _stated(said)) is not None:
        return stated
    how = f"container {container['name']} ended with exit code {ended.get('exitCode')} ({ended.get('reason') or 'Error'})"
    reason = ended["reason"] if ended.get("reason") in ("OOMKilled", "StartError", "ContainerCannotRun") else "ContainerFailed"
    return Trouble(reason, f"{how}: {said}" if said else how)


def _stated(text: str) -> Trouble | None:
    """A stage's own statement, as `store.stage` leaves it: in full, or as the last line of its log."""
    for line in (text, text.rsplit("\n", 1)[-1]):
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and isinstance(said.get("reason"), str):
            return Trouble(said["reason"], str(said.get("message") or ""))
    return None


def _containers(pod: Manifest) -> list[Manifest]:
    status = _status(pod)
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _ended(container: Manifest) -> Manifest | None:
    ended: Manifest | None = (container.get("state") or {}).get("terminated") or (container.get("lastState") or {}).get("terminated")
    return ended


def _at(pod: Manifest, what: Manifest) -> str:
    return f"pod {pod['metadata']['name']}: {what.get('message') or what.get('reason')}"


def _status(manifest: Manifest) -> Manifest:
    status: Manifest = manifest.get("status") or {}
    return status


def _phase(pod: Manifest) -> str:
    return str(_status(pod).get("phase") or "Pending")


def _lives(pod: Manifest) -> bool:
    return _phase(pod) not in ("Succeeded", "Failed")


def _true(manifest: Manifest, *types: str) -> Manifest | None:
    conditions: Sequence[Manifest] = _status(manifest).get("conditions") or ()
    return next((c for c in conditions if c["type"] in types and c["status"] == "True"), None)


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
