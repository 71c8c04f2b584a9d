"""Events about runs, for `kubectl describe`: one for each distinct message, counted if it is repeated."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import structlog

from dagger_operator.cluster.client import FIELD_MANAGER, Client
from dagger_operator.control import Event
from dagger_operator.kube.errors import ApiError, Conflict

log = structlog.get_logger()

_LONGEST = 1024
"""Maximum characters of a message that the API server accepts."""


class Teller:
    def __init__(self, client: Client) -> None:
        self._client = client

    async def tell(self, run: Mapping[str, Any], event: Event) -> None:
        """Emit an event; called once the status with the same content was written. Failures are logged: nothing depends on an Event."""
        manifest = _manifest(run, event)
        try:
            try:
                await self._client.create(manifest)
            except Conflict:
                await self._again(manifest)
        except ApiError as error:
            log.info(
                "event not told", namespace=run["metadata"]["namespace"], name=run["metadata"]["name"], told=event.reason, error=str(error)
            )

    async def _again(self, manifest: dict[str, Any]) -> None:
        place = manifest["metadata"]
        known = await self._client.get("v1", "Event", place["namespace"], place["name"])
        head = {"apiVersion": "v1", "kind": "Event", "metadata": place}
        await self._client.patch({**head, "count": int(known.get("count") or 1) + 1, "lastTimestamp": manifest["lastTimestamp"]})


def _manifest(run: Mapping[str, Any], event: Event) -> dict[str, Any]:
    metadata = run["metadata"]
    said = f"{metadata['uid']}/{event.type}/{event.reason}/{event.message}"
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": metadata["namespace"], "name": f"{metadata['name']}.{hashlib.sha256(said.encode()).hexdigest()[:16]}"},
        "involvedObject": {
            "apiVersion": run["apiVersion"],
            "kind": run["kind"],
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message if len(event.message) <= _LONGEST else event.message[: _LONGEST - 1] + "…",
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
