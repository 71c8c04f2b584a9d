"""What pods report about themselves: why they wait, how they ended. Pure; pods are in Kubernetes form."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from dagger_operator.control.child import PodFailure, Trouble
from dagger_operator.control.conditions import IN_A_QUEUE, Reason
from dagger_operator.control.names import COMPLETION_INDEX, COMPONENT
from dagger_operator.control.remedies import explained
from dagger_operator.store.stage import ExitCode

Manifest = Mapping[str, Any]

SERVER_RESTARTS = 5
"""A server that is in back-off after this many restarts since it was last ready, or whose nodes were recreated more often, is given up.
Restarts for lack of a service do not count."""
_FIRST_PAUSE, _LONGEST_PAUSE = timedelta(seconds=10), timedelta(minutes=5)
"""A kubelet's pauses before it restarts a container that ended again."""
_OVERDUE = timedelta(seconds=60)
"""A pod should be gone at its deletionTimestamp, which includes its grace period; a live kubelet confirms that within this time."""


def waiting(pods: Iterable[Manifest]) -> Trouble | None:
    """Return the first reason, in order of pods' names, for which a pod does not run."""
    for pod in sorted(pods, key=lambda one: str(one["metadata"]["name"])):
        if not lives(pod):
            continue
        if (nowhere := _unplaced(pod)) is not None:
            return nowhere
        for container in _containers(pod):
            held = (container.get("state") or {}).get("waiting") or {}
            reason = held.get("reason", "")
            if not reason or reason in ("PodInitializing", "ContainerCreating"):
                continue
            since = time(pod["metadata"].get("creationTimestamp"))
            said = explained(pod, reason, held.get("message") or reason, container["name"])
            if (ended := _ended(container)) is not None:
                said = f"{said}; it ended with: {_explained(container, ended).message}"
            return Trouble(reason, said, since)
    return None


def unplaced(pods: Iterable[Manifest]) -> Trouble | None:
    """Return the first reason, in order of pods' names, for which a pod has no node."""
    found = (_unplaced(pod) for pod in sorted(pods, key=lambda one: str(one["metadata"]["name"])) if lives(pod))
    return next((trouble for trouble in found if trouble is not None), None)


def _unplaced(pod: Manifest) -> Trouble | None:
    for condition in status(pod).get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            reason = condition.get("reason") or "Unschedulable"
            said = explained(pod, reason, condition.get("message") or reason)
            return Trouble(reason, said, time(condition.get("lastTransitionTime")))
    return None


def placed(pods: Iterable[Manifest], wanted: int) -> datetime | None:
    """Return since when all pods of a server have had their nodes; None if one lacks it or does not exist.

    A pod about which the scheduler has said nothing yet counts from its creation, so a new pod never looks as if it had been there before.
    """
    there = [pod for pod in pods if lives(pod) and not pod["metadata"].get("deletionTimestamp")]
    if len(there) < max(1, wanted) or unplaced(there) is not None:
        return None
    told = [one for pod in there for one in status(pod).get("conditions") or () if one["type"] == "PodScheduled"]
    times = [*(pod["metadata"].get("creationTimestamp") for pod in there), *(one.get("lastTransitionTime") for one in told)]
    return max((at for text in times if (at := time(text)) is not None), default=None)


def lost(pods: Iterable[Manifest], now: datetime) -> Trouble | None:
    """Return the trouble of the first pod that should be gone and still exists, because its node does not report that it ended; no
    replacement is created."""
    due = [
        (at, str(pod["metadata"]["name"]), str((pod.get("spec") or {}).get("nodeName") or "unknown"))
        for pod in pods
        if lives(pod) and (at := time(pod["metadata"].get("deletionTimestamp"))) is not None and now - at > _OVERDUE
    ]
    if not due:
        return None
    at, name, node = min(due)
    return Trouble(
        Reason.NODE_LOST,
        f"pod {name} was to end, and its node {node} does not say that it did; no other takes its place before that: where the node does "
        f"not come back, delete it (`kubectl delete node {node}`), taint it node.kubernetes.io/out-of-service, or, once nothing runs on "
        f"it, `kubectl delete pod {name} --force --grace-period=0`",
        at,
    )


def waiting_since(pods: Iterable[Manifest]) -> datetime | None:
    """Return when the oldest pod in which nothing runs was created; those in a queue do not count."""
    made = [time(pod["metadata"].get("creationTimestamp")) for pod in pods if _idle(pod)]
    return min((at for at in made if at is not None), default=None)


def _idle(pod: Manifest) -> bool:
    queued = any(one.get("reason") == IN_A_QUEUE for one in status(pod).get("conditions") or ())
    # A pod whose init container runs is still called pending.
    return phase(pod) == "Pending" and not queued and not any("running" in (one.get("state") or {}) for one in _containers(pod))


def unready_for(pod: Manifest, now: datetime) -> timedelta:
    """Return for how long a pod has had its node without being ready: zero if it is ready, has no node yet, or is to be deleted.

    A runtime without a scheduler gives no times: then it is infinite.
    """
    told = {one["type"]: one for one in status(pod).get("conditions") or ()}
    ready, placed = told.get("Ready", {}), told.get("PodScheduled", {})
    if not lives(pod) or pod["metadata"].get("deletionTimestamp") or ready.get("status") == "True" or placed.get("status") == "False":
        return timedelta(0)
    times = (pod["metadata"].get("creationTimestamp"), placed.get("lastTransitionTime"), ready.get("lastTransitionTime"))
    known = [at for text in times if (at := time(text)) is not None]
    return now - max(known) if known else timedelta.max


def overdue(pod: Manifest, patience: timedelta) -> Trouble:
    """Return the trouble of a server's pod that is not ready in time, if no other reason is known."""
    role = (pod["metadata"].get("labels") or {}).get(COMPONENT, "")
    said = f"pod {pod['metadata']['name']} was not ready within {patience.total_seconds():.0f} s: its containers' logs say why"
    return Trouble("ProgressDeadlineExceeded", f"{said}; where loading only takes longer, raise spec.{role}.serving.startupDeadlineSeconds")


def broken_server(pods: Iterable[Manifest], now: datetime, patience: timedelta) -> Trouble | None:
    """Return why a server is broken: another start would not fix it, or many in a row did not. `patience` is how long it may take to become
    ready."""
    for pod in pods:
        for container in _containers(pod):
            ended = _ended(container)
            if ended is None:
                continue
            given_time = ended.get("exitCode") == ExitCode.UNAVAILABLE or _in_a_row(pod, container, now, patience) < SERVER_RESTARTS
            if ended.get("exitCode") == ExitCode.PERMANENT or (_backs_off(container) and not given_time):
                return _explained(container, ended)
    return None


def restarting(begun_anew: Sequence[PodFailure], pods: Iterable[Manifest]) -> Trouble | None:
    """Return the trouble of a server whose nodes are all recreated again and again, quoting the last container that ended if it still
    exists."""
    if not begun_anew:
        return None
    often = f"all its nodes were restarted {len(begun_anew)} times since they last were ready; the last time: {begun_anew[-1].message}"
    last = last_words(pods)
    hint = f"; {last.message}" if last else "; what the pods logged goes with them: follow it (`kubectl logs --follow`) or collect it"
    return Trouble(begun_anew[-1].reason, often + hint)


def unavailable(pods: Iterable[Manifest], now: datetime, patience: timedelta) -> tuple[PodFailure, ...]:
    """Return the failures in a row of the container with most of them, among a server's containers in back-off for lack of a service, such
    as storage or the hub."""
    found: list[tuple[PodFailure, ...]] = [()]
    for pod, container in ((one, container) for one in pods for container in _containers(one) if _backs_off(container)):
        ended = _ended(container)
        if ended is not None and ended.get("exitCode") == ExitCode.UNAVAILABLE:
            said = _explained(container, ended)
            # Each restart followed an end, and the last end is not yet followed by one.
            found.append((PodFailure(said.reason, said.message, ExitCode.UNAVAILABLE),) * (_in_a_row(pod, container, now, patience) + 1))
    return max(found, key=len)


def _in_a_row(pod: Manifest, container: Manifest, now: datetime, patience: timedelta) -> int:
    """Return an upper bound of how often a container was restarted since its pod was last ready. `restartCount` covers the pod's whole
    life.

    A container that ran for longer than a start may take had started. Otherwise the time for which the pod has not been ready gives the
    bound: a kubelet restarts a container at once, and from then on after its pauses.
    """
    ended = _ended(container) or {}
    began, at = time(ended.get("startedAt")), time(ended.get("finishedAt"))
    if began is not None and at is not None and at - began > patience:
        return 0
    counted = int(container.get("restartCount", 0))
    restarts, left, pause = min(1, counted), unready_for(pod, now), _FIRST_PAUSE
    while restarts < counted and left >= pause:
        restarts, left, pause = restarts + 1, left - pause, min(2 * pause, _LONGEST_PAUSE)
    return restarts


def _backs_off(container: Manifest) -> bool:
    held = (container.get("state") or {}).get("waiting") or {}
    return bool(held.get("reason") == "CrashLoopBackOff")


def failures(pods: Iterable[Manifest]) -> tuple[PodFailure, ...]:
    """Return how pods that failed ended, oldest first. A pod that is being deleted was ended by its deletion, which costs nothing."""
    found = []
    for pod in pods:
        if phase(pod) != "Failed" or pod["metadata"].get("deletionTimestamp"):
            continue
        disrupted = any(one["type"] == "DisruptionTarget" and one["status"] == "True" for one in status(pod).get("conditions") or ())
        at, said, code = _end(pod)
        index = (pod["metadata"].get("labels") or {}).get(COMPLETION_INDEX, "")
        found.append((at, str(pod["metadata"]["name"]), PodFailure(said.reason, said.message, code, disrupted, index, time(at))))
    return tuple(failure for _, _, failure in sorted(found, key=lambda one: one[:2]))


def _end(pod: Manifest) -> tuple[str, Trouble, int | None]:
    """Return when, why and with which exit code a failed pod ended."""
    for container in _containers(pod):
        ended = _ended(container)
        if ended is not None and ended.get("exitCode") != ExitCode.DONE:
            return str(ended.get("finishedAt") or ""), _explained(container, ended), ended.get("exitCode")
    at = str(pod["metadata"].get("creationTimestamp") or "")
    return at, Trouble(status(pod).get("reason") or "PodFailed", f"pod {pod['metadata']['name']}: {status(pod).get('message') or ''}"), None


def last_words(pods: Iterable[Manifest]) -> Trouble | None:
    """Return the termination message of the container that failed last, and how often it was restarted."""
    ends = [
        (str(ended.get("finishedAt") or ""), container, ended)
        for pod in pods
        for container in _containers(pod)
        if (ended := _ended(container)) is not None and ended.get("exitCode") != ExitCode.DONE
    ]
    if not ends:
        return None
    # A failure that a retry cannot fix explains more than the pods that were stopped because of it.
    _, container, ended = max(ends, key=lambda end: (end[2].get("exitCode") == ExitCode.PERMANENT, end[0]))
    said, again = _explained(container, ended), container.get("restartCount", 0)
    return replace(said, message=f"{said.message} (restarts so far: {again})") if again else said


def _explained(container: Manifest, ended: Manifest) -> Trouble:
    said = str(ended.get("message") or "").strip()
    if (words := stated(said)) is not None:
        return words
    how = f"container {container['name']} ended with exit code {ended.get('exitCode')} ({ended.get('reason') or 'Error'})"
    reason = ended["reason"] if ended.get("reason") in ("OOMKilled", "StartError", "ContainerCannotRun") else "ContainerFailed"
    return Trouble(reason, f"{how}: {said}" if said else how)


def stated(text: str) -> Trouble | None:
    """Return a stage's own statement, as `store.stage` leaves it: in full, or as the last line of its log."""
    for line in (text, text.rsplit("\n", 1)[-1]):
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and isinstance(said.get("reason"), str):
            return Trouble(said["reason"], str(said.get("message") or ""))
    return None


def _containers(pod: Manifest) -> list[Manifest]:
    found = status(pod)
    return [*(found.get("initContainerStatuses") or ()), *(found.get("containerStatuses") or ())]


def _ended(container: Manifest) -> Manifest | None:
    ended: Manifest | None = (container.get("state") or {}).get("terminated") or (container.get("lastState") or {}).get("terminated")
    return ended


def status(manifest: Manifest) -> Manifest:
    found: Manifest = manifest.get("status") or {}
    return found


def phase(pod: Manifest) -> str:
    return str(status(pod).get("phase") or "Pending")


def lives(pod: Manifest) -> bool:
    return phase(pod) not in ("Succeeded", "Failed")


def true(manifest: Manifest, *types: str) -> Manifest | None:
    """Return the first condition of these types that holds."""
    conditions: Sequence[Manifest] = status(manifest).get("conditions") or ()
    return next((c for c in conditions if c["type"] in types and c["status"] == "True"), None)


def time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
