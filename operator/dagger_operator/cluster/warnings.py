"""What the API server keeps about objects that should have pods and have none: a quota, an admission policy, a missing ServiceAccount."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from dagger_operator.cluster.client import Client
from dagger_operator.cluster.ownership import controller
from dagger_operator.control import Trouble
from dagger_operator.kube.errors import Refused, Unavailable

Manifest = Mapping[str, Any]

PATIENCE = timedelta(seconds=5)
"""An object this young may just not have been given its pods yet."""


async def warnings_about(
    client: Client, objects: Iterable[Manifest], pods: Sequence[Manifest], now: datetime
) -> dict[tuple[str, str], Trouble]:
    """Why objects have no pods, by kind and name."""
    found: dict[tuple[str, str], Trouble] = {}
    made_for = {owner["uid"] for pod in pods if (owner := controller(pod)) is not None}
    for one in objects:
        kind, name = one["kind"], one["metadata"]["name"]
        trouble = None
        if kind == "Deployment":
            trouble = replica_failure(one)
        elif kind == "Job" and _wants_pods(one, now) and one["metadata"]["uid"] not in made_for:
            trouble = await _newest_warning(client, one)
        if trouble is not None:
            found[kind, name] = trouble
    return found


def replica_failure(deployment: Manifest) -> Trouble | None:
    """A Deployment tells itself why its ReplicaSet cannot make pods."""
    for condition in (deployment.get("status") or {}).get("conditions") or ():
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            message = condition.get("message") or ""
            return Trouble(_reason(message, condition.get("reason") or "FailedCreate"), message, _time(condition.get("lastTransitionTime")))
    return None


def _wants_pods(job: Manifest, now: datetime) -> bool:
    status = job.get("status") or {}
    ended = any(one["type"] in ("Complete", "Failed") and one["status"] == "True" for one in status.get("conditions") or ())
    made = _time(job["metadata"].get("creationTimestamp"))
    return not ended and not job["spec"].get("suspend") and not status.get("active") and made is not None and now - made > PATIENCE


async def _newest_warning(client: Client, job: Manifest) -> Trouble | None:
    metadata = job["metadata"]
    about = f"involvedObject.uid={metadata['uid']},type=Warning"
    try:
        warnings = [one async for one in client.list("v1", "Event", metadata["namespace"], fieldSelector=about)]
    except (Refused, Unavailable):
        return None  # an explanation less; the run is none the worse
    newest = max(warnings, key=_last_seen, default=None)
    if newest is None:
        return None
    message = newest.get("message") or ""
    return Trouble(_reason(message, newest.get("reason") or "Warning"), message, _time(newest.get("firstTimestamp")))


def _last_seen(event: Manifest) -> str:
    series = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or "")


def _reason(message: str, otherwise: str) -> str:
    return "QuotaExceeded" if "exceeded quota" in message else otherwise


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
