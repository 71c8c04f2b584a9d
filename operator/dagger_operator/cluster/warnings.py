"""What the API server records about objects that lack pods: a quota, an admission policy, a missing ServiceAccount."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from dagger_operator.cluster.client import Client
from dagger_operator.cluster.ownership import controller
from dagger_operator.control import Trouble
from dagger_operator.control.said import lives, time
from dagger_operator.kube.errors import Refused, Unavailable

Manifest = Mapping[str, Any]

PATIENCE = timedelta(seconds=5)
"""An object this young may simply not have its pods yet."""
_ENDS = frozenset({"Complete", "SuccessCriteriaMet", "Failed", "FailureTarget"})


async def warnings_about(
    client: Client, objects: Iterable[Manifest], pods: Sequence[Manifest], now: datetime
) -> dict[tuple[str, str], Trouble]:
    """Return why objects lack pods, by kind and name. Events are listed only for objects that lack some."""
    found: dict[tuple[str, str], Trouble] = {}
    for one in objects:
        kind, name = one["kind"], one["metadata"]["name"]
        trouble = None
        if kind == "Deployment":
            trouble = replica_failure(one)
        elif kind in _MAKERS:
            makers = _MAKERS[kind](one)
            own = [pod for pod in pods if (owner := controller(pod)) is not None and (owner["kind"], owner["name"]) in makers]
            newest = max(_begun(each) for each in (one, *own))
            # The newest pod may not have been seen or counted by its controller yet.
            if _lacks_pods(one, own) and now - newest > PATIENCE:
                trouble = await _newest_warning(client, one["metadata"]["namespace"], makers, newest)
        if trouble is not None:
            found[kind, name] = trouble
    return found


def _of_group(group: Manifest) -> set[tuple[str, str]]:
    """Return the StatefulSets of a group: one for the first nodes, and one for the others of each replica."""
    name = group["metadata"]["name"]
    return {("StatefulSet", name), *(("StatefulSet", f"{name}-{index}") for index in range(int(group["spec"].get("replicas", 1))))}


_MAKERS: Mapping[str, Callable[[Manifest], set[tuple[str, str]]]] = {
    "Job": lambda job: {("Job", job["metadata"]["name"])},
    "LeaderWorkerSet": _of_group,
}
"""Kind and name of the creators of an object's pods, which Events refer to."""


def replica_failure(deployment: Manifest) -> Trouble | None:
    """Return why a Deployment's ReplicaSet cannot create pods; the Deployment itself reports this."""
    for condition in (deployment.get("status") or {}).get("conditions") or ():
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            message = condition.get("message") or ""
            return Trouble(_reason(message, condition.get("reason") or "FailedCreate"), message, time(condition.get("lastTransitionTime")))
    return None


def _lacks_pods(one: Manifest, pods: Iterable[Manifest]) -> bool:
    """Whether it has fewer pods than it should have. Terminating ones count: they are not replaced yet."""
    spec, status = one["spec"], one.get("status") or {}
    living = sum(map(lives, pods))
    if one["kind"] == "LeaderWorkerSet":
        return living < int(spec.get("replicas", 1)) * int(spec["leaderWorkerTemplate"].get("size", 1))
    if spec.get("suspend") or any(told["type"] in _ENDS and told["status"] == "True" for told in status.get("conditions") or ()):
        return False
    counted = int(status.get("active") or 0) + int(status.get("terminating") or 0)
    return max(living, counted) + int(status.get("succeeded") or 0) < int(spec.get("parallelism", 1))


async def _newest_warning(client: Client, namespace: str, makers: Collection[tuple[str, str]], newest_pod: datetime) -> Trouble | None:
    """Return the last warning, unless a pod was created after it: then it is about an earlier refusal. An event covers many refusals, so
    this one began when the newest pod was created, or later."""
    ((kind, name), *others) = sorted(makers)
    about = f"involvedObject.kind={kind},type=Warning" + ("" if others else f",involvedObject.name={name}")
    try:
        every = [one async for one in client.list("v1", "Event", namespace, fieldSelector=about)]
    except (Refused, Unavailable):
        return None  # one explanation less; the run is unaffected
    warnings = [one for one in every if (one["involvedObject"]["kind"], one["involvedObject"]["name"]) in makers]
    newest = max(warnings, key=_last_seen, default=None)
    if newest is None or (seen := time(_last_seen(newest))) is None or seen < newest_pod:
        return None
    message = newest.get("message") or ""
    began = time(newest.get("firstTimestamp") or newest.get("eventTime"))
    return Trouble(_reason(message, newest.get("reason") or "Warning"), message, max(began, newest_pod) if began else newest_pod)


def _last_seen(event: Manifest) -> str:
    series = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or "")


def _begun(manifest: Manifest) -> datetime:
    """Return when an object was created, or a Job resumed."""
    times = (manifest["metadata"]["creationTimestamp"], (manifest.get("status") or {}).get("startTime"))
    return max(at for text in times if (at := time(text)) is not None)


def _reason(message: str, otherwise: str) -> str:
    return "QuotaExceeded" if "exceeded quota" in message else otherwise
