"""What is observed, reduced to what the plan needs for its decisions.

Pure: Kubernetes-form objects and pods go in, from an API server or from the local runtime, and `Child`ren come out. A child mirrors its
pods' own reasons, so that a condition can say why a run waits without anyone looking at pods.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from dagger_operator.control import names
from dagger_operator.control.child import SERVERS, Child, ChildState, PodFailure, Trouble
from dagger_operator.control.network import PROMETHEUS, Peer
from dagger_operator.control.progress import Progress
from dagger_operator.control.remedies import within_quota
from dagger_operator.control.results import Results
from dagger_operator.control.rounds import StageName
from dagger_operator.control.said import (
    SERVER_RESTARTS,
    broken_server,
    failures,
    last_words,
    lives,
    lost,
    overdue,
    phase,
    placed,
    restarting,
    stated,
    status,
    time,
    true,
    unavailable,
    unplaced,
    unready_for,
    waiting,
    waiting_since,
)

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Observed:
    """Everything that a plan depends on besides the run itself. A view of children may be slightly old, but shows what this controller
    itself wrote. Read children first, then results: a finished Job's result is then seen."""

    now: datetime
    children: tuple[Child, ...] = ()
    results: Results = field(default_factory=Results)
    storage_problem: str | None = None
    """Set if results could not be read: then nothing is known about progress, and nothing is started or thrown away."""
    refused: Trouble | None = None
    """An object that the API server refused at the last attempt; `since` is when it was first refused."""
    progress: Progress = field(default_factory=dict)
    """Progress of the current steps; only shown, never used for decisions."""
    scrapers: tuple[Peer, ...] = PROMETHEUS
    """Which peers may scrape servers."""


def children(
    objects: Iterable[Manifest],
    pods: Iterable[Manifest],
    now: datetime,
    warnings: Mapping[tuple[str, str], Trouble] = {},
    begun_anew: Mapping[str, Sequence[PodFailure]] = {},
) -> tuple[Child, ...]:
    """Return the children represented by a run's objects and pods. Pods without an object (deleted before them) are children of kind Pod.

    `warnings` says by kind and name why an object lacks pods: if its pods give no reason, that is why it waits. `begun_anew` says by name
    how often all pods of a LeaderWorkerSet's replica were replaced since it was last available.
    """
    unclaimed = list(pods)
    found = []
    for manifest in objects:
        own = [pod for pod in unclaimed if _owns(manifest, pod)]
        unclaimed = [pod for pod in unclaimed if pod not in own]
        warning = warnings.get((manifest["kind"], manifest["metadata"]["name"]))
        anew = begun_anew.get(manifest["metadata"]["name"], ()) if manifest["kind"] == "LeaderWorkerSet" else ()
        found.append(child(manifest, own, now, warning, anew))
    found += [child(pod, [pod], now) for pod in unclaimed if lives(pod)]
    return tuple(sorted(found, key=lambda one: (one.kind, one.name)))


def child(
    manifest: Manifest,
    pods: Sequence[Manifest],
    now: datetime,
    warning: Trouble | None = None,
    begun_anew: Sequence[PodFailure] = (),
) -> Child:
    """Return the child for one object with its own pods, why it lacks some, and how often all were replaced."""
    metadata, kind = manifest["metadata"], manifest["kind"]
    labels = metadata.get("labels") or {}
    attempt = labels.get(names.ATTEMPT, "")
    # Pods of an earlier template say nothing about the current one, but they still hold resources.
    current = [pod for pod in pods if not attempt or (pod["metadata"].get("labels") or {}).get(names.ATTEMPT) == attempt]
    one = Child(
        kind=kind,
        name=metadata["name"],
        component=labels.get(names.COMPONENT, ""),
        round=names.round_of(labels),
        attempt=attempt,
        pods=sum(map(lives, pods)),
        api_version=manifest.get("apiVersion", ""),
        uid=metadata.get("uid", ""),
        deleting=metadata.get("deletionTimestamp") is not None,
        lost=lost(pods, now),
    )
    warning = within_quota(warning, one.component) if warning else None
    if kind == "Job":
        counted = int(status(manifest).get("active") or 0) + int(status(manifest).get("terminating") or 0)
        return replace(_job(one, manifest, current, now, warning), pods=max(one.pods, counted), failures=failures(current))
    if kind in SERVERS:
        # A Deployment replaces a pod at once, but uses no new template while a pod of the old one is left; a group's pods keep their names.
        away = lost([pod for pod in pods if kind == "LeaderWorkerSet" or pod not in current], now)
        server = _server(one, manifest, current, now, away, warning, begun_anew)
        since = placed(current, _pods_wanted(manifest))
        return replace(server, pods=max(one.pods, int(status(manifest).get("replicas") or 0)), placed=since)
    return replace(one, state=ChildState.RUNNING, trouble=waiting(pods)) if kind == "Pod" else one


def _owns(manifest: Manifest, pod: Manifest) -> bool:
    """Whether a pod belongs to an object: by labels, since a Deployment's pods are owned by ReplicaSets, which are not observed; for a
    Job's pods also by their owner."""
    keys = {"Job": (names.COMPONENT, names.ROUND, names.ATTEMPT), **dict.fromkeys(SERVERS, (names.COMPONENT,))}.get(manifest["kind"])
    ours, theirs = manifest["metadata"].get("labels") or {}, pod["metadata"].get("labels") or {}
    if keys is None or any(ours.get(key) != theirs.get(key) for key in keys):
        return False
    owners = [one.get("uid") for one in pod["metadata"].get("ownerReferences") or () if one.get("kind") == manifest["kind"]]
    return not owners or manifest["metadata"].get("uid") in (None, *owners)


def _pods_wanted(server: Manifest) -> int:
    spec = server["spec"]
    return int(spec.get("replicas", 1)) * int((spec.get("leaderWorkerTemplate") or {}).get("size", 1))


def _given_up(manifest: Manifest) -> Trouble | None:
    """Return what the plan itself wrote about a child that failed."""
    note = (manifest["metadata"].get("annotations") or {}).get(names.FAILED)
    return None if note is None else stated(note) or Trouble("Failed", note)


def _job(one: Child, manifest: Manifest, pods: Sequence[Manifest], now: datetime, warning: Trouble | None) -> Child:
    complete, failed = true(manifest, "Complete", "SuccessCriteriaMet"), true(manifest, "Failed", "FailureTarget")
    if complete:
        return replace(one, state=ChildState.SUCCEEDED, finished=time(complete.get("lastTransitionTime")))
    if (noted := _given_up(manifest)) is not None:
        return replace(one, state=ChildState.FAILED, trouble=noted, finished=time((failed or {}).get("lastTransitionTime")))
    if failed:
        said = last_words(pods) or Trouble(failed.get("reason") or "JobFailed", failed.get("message") or "")
        return replace(one, state=ChildState.FAILED, trouble=said, finished=time(failed.get("lastTransitionTime")))
    if manifest["spec"].get("suspend"):
        return replace(one, state=ChildState.SUSPENDED)
    away = lost(pods, now)
    held = away or waiting(pods) or warning
    since = _earliest(waiting_since(pods), away, warning)
    # The ranks of a training wait for each other; workers do not.
    gang = one.component == StageName.TRAINING
    if any(phase(pod) == "Running" and not lost([pod], now) for pod in pods) and not (gang and held):
        return replace(one, state=ChildState.RUNNING, trouble=held, waiting_since=since if gang else None)
    # Between retries, the last failure is the reason for the wait. Only the source of a warning knows for how long pods have been missing.
    return replace(one, state=ChildState.WAITING, trouble=held or last_words(pods), waiting_since=since)


def _earliest(since: datetime | None, *troubles: Trouble | None) -> datetime | None:
    return min((at for at in (since, *(one.since for one in troubles if one)) if at is not None), default=None)


def _server(
    one: Child,
    manifest: Manifest,
    pods: Sequence[Manifest],
    now: datetime,
    away: Trouble | None,
    warning: Trouble | None,
    begun_anew: Sequence[PodFailure],
) -> Child:
    if (noted := _given_up(manifest)) is not None:
        return replace(one, state=ChildState.FAILED, trouble=noted)
    found, wanted = status(manifest), manifest["spec"].get("replicas", 1)
    if wanted == 0:
        return replace(one, state=ChildState.SUSPENDED)
    # How long it may take to become ready.
    patience = timedelta(seconds=manifest["spec"].get("progressDeadlineSeconds", 600))
    again = restarting(begun_anew, pods)
    held = away or waiting(pods) or warning or again
    if (broken := broken_server(pods, now, patience)) is not None or (again is not None and len(begun_anew) > SERVER_RESTARTS):
        return replace(one, state=ChildState.FAILED, trouble=broken or again)
    progress: Manifest = next((c for c in found.get("conditions") or () if c["type"] == "Progressing"), {})
    # A Deployment does not count scheduling as progress: a pod that waited for a node would be late before it starts.
    late = next((pod for pod in pods if unready_for(pod, now) >= patience), None)
    if late is not None and progress.get("reason") in _PROGRESSES_NO_MORE:
        return replace(one, state=ChildState.FAILED, trouble=last_words(pods) or held or overdue(late, patience))
    generation = manifest["metadata"].get("generation", 0)
    seen = found.get("observedGeneration", generation) >= generation
    if seen and wanted == found.get("updatedReplicas") == found.get("readyReplicas") == found.get("replicas"):
        return replace(one, state=ChildState.READY)
    since = _earliest(waiting_since(pods), away, warning)
    state = ChildState.WAITING if held else ChildState.RUNNING
    nowhere = away or unplaced(pods) or warning
    one = replace(one, state=state, trouble=held or last_words(pods), waiting_since=since, unplaced=nowhere)
    return replace(one, failures=unavailable(pods, now, patience))


_PROGRESSES_NO_MORE = frozenset({"ProgressDeadlineExceeded", "NewReplicaSetAvailable"})
"""Reasons with which a Deployment says that it no longer tracks progress: it gave up, or was complete once. From then on it does not,
however often it is scaled to zero and back."""
