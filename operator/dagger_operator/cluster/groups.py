"""How often the nodes of a LeaderWorkerSet were recreated.

Its controller replaces all pods of a replica when a container of one of them ends, so no remaining pod has counted it: only Events record
it, for as long as the API server keeps them (an hour).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from dagger_operator.cluster.client import Client
from dagger_operator.control import PodFailure
from dagger_operator.control.said import time
from dagger_operator.kube.errors import Refused, Unavailable

Manifest = Mapping[str, Any]


async def begun_anew(client: Client, objects: Iterable[Manifest]) -> dict[str, tuple[PodFailure, ...]]:
    """Return, by name of each LeaderWorkerSet that is not available, an entry for each recreation since it last was, for the replica with
    most of them."""
    found: dict[str, tuple[PodFailure, ...]] = {}
    for one in objects:
        if one["kind"] == "LeaderWorkerSet" and (since := _unavailable_since(one)) is not None:
            found[one["metadata"]["name"]] = await _ends(client, one, since)
    return found


def _unavailable_since(group: Manifest) -> datetime | None:
    conditions = (group.get("status") or {}).get("conditions") or ()
    began: Manifest = next((one for one in conditions if one["type"] == "Progressing" and one["status"] == "True"), {})
    return time(began.get("lastTransitionTime"))


async def _ends(client: Client, group: Manifest, since: datetime) -> tuple[PodFailure, ...]:
    metadata = group["metadata"]
    about = f"involvedObject.kind=LeaderWorkerSet,involvedObject.name={metadata['name']},reason=RecreateGroup"
    try:
        events = [one async for one in client.list("v1", "Event", metadata["namespace"], fieldSelector=about)]
    except (Refused, Unavailable):
        return ()  # one explanation less; the run is unaffected
    by_replica: dict[str, dict[str, PodFailure]] = defaultdict(dict)
    for event in sorted(events, key=lambda one: str(one.get("eventTime") or one.get("lastTimestamp") or "")):
        at, first = time(event.get("eventTime") or event.get("lastTimestamp")), event.get("related") or {}
        if at is not None and at >= since and first.get("name"):
            # Each removed first node counts once, however often it was reported.
            by_replica[first["name"]][first.get("uid", "")] = PodFailure("GroupBegunAnew", str(event.get("message") or ""))
    return max((tuple(times.values()) for times in by_replica.values()), key=len, default=())
