"""Creates and updates what should exist, and removes what should not; sends the API server no request that would change nothing."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import structlog

from dagger_operator.api import DAggerRun
from dagger_operator.cluster.cache import Cache, identity, run_key
from dagger_operator.cluster.client import Client
from dagger_operator.cluster.ownership import controller, is_own
from dagger_operator.control import MANAGED_BY, MANAGED_BY_VALUE, RETRY, Ref, Trouble
from dagger_operator.control.remedies import shortened
from dagger_operator.control.scheduling import QUEUE
from dagger_operator.kube.errors import ApiError, Conflict, Missing, Refused, Unavailable

Manifest = Mapping[str, Any]

APPLIED = "dagger-operator.dev/applied"
"""Annotation: digest of the manifest that was applied last."""

log = structlog.get_logger()


class Applier:
    def __init__(self, client: Client, cache: Cache) -> None:
        self._client, self._cache = client, cache
        self._settled: dict[str, int | str] = {}

    async def apply(self, run: DAggerRun, manifest: Manifest, *, dry_run: bool = False) -> Trouble | None:
        """Return why the API server refused an object; None if it is as it should be, or with `dry_run` could be.

        Raises `Conflict`, and `Unavailable` if no other object would fare better: then the run is to be looked at again.
        """
        one = identity(manifest)
        live: Manifest | None = self._cache.get(one)
        try:
            if live is None:
                live = await self._found(manifest)
            if live is None and one.kind == "Job" and not dry_run:
                await self._require_unchanged(run)
            if live is not None:
                if not _may_touch(run, manifest, live):
                    return _taken(live)
                if live["metadata"].get("deletionTimestamp"):
                    return None  # once it is gone an event arrives, and a new one is created
                if self._is_settled(manifest, live):
                    return None
            stamped = _stamped(manifest, live)
            if live is not None and _in_a_queue(live):
                fresh = await self._client.patch(_without_template(stamped), dry_run=dry_run)
            else:
                fresh = await self._client.apply(stamped, dry_run=dry_run)
        except (Refused, Missing, Unavailable) as error:
            return _refusal(one.kind, one.namespace, one.name, error)
        if dry_run:
            return None
        self._settled[fresh["metadata"]["uid"]] = _version(fresh)
        self._cache.put(fresh)
        log.info("created" if live is None else "changed", kind=one.kind, namespace=one.namespace, name=one.name)
        return None

    async def remove(self, run: DAggerRun, ref: Ref) -> Trouble | None:
        """Delete in the foreground: the object stays until its pods are gone. Another object of the same name is left alone (`Conflict`).

        Returns why the API server refused, as `apply` does.
        """
        preconditions = {"uid": ref.uid} if ref.uid else {}
        try:
            answer = await self._client.delete(ref.api_version, ref.kind, run.metadata.namespace, ref.name, preconditions=preconditions)
        except (Refused, Missing, Unavailable) as error:
            return _refusal(ref.kind, run.metadata.namespace, f"{ref.name} cannot be removed", error)
        log.info("removing", kind=ref.kind, namespace=run.metadata.namespace, name=ref.name)
        if answer is not None:
            self._cache.put(answer)
        return None

    def forget(self, uid: str) -> None:
        """Forget an object that is gone."""
        self._settled.pop(uid, None)

    async def _found(self, manifest: Manifest) -> Manifest | None:
        """Return the live object, read once more before one is created: the cache may be behind, and the name may be taken by an object
        without our labels."""
        one = identity(manifest)
        try:
            live = await self._client.get(manifest["apiVersion"], *one)
        except Missing as error:
            if error.reason == "KindNotInstalled":
                raise
            return None
        if run_key(live) is not None:
            self._cache.put(live)
        return live

    async def _require_unchanged(self, run: DAggerRun) -> None:
        """Raise `Conflict` unless a run is as it was planned for. If two controllers work at once, the one that is late to see an edit
        would recreate a Job that the other has removed because of it, next to its replacement."""
        metadata = run.metadata
        try:
            fresh = await self._client.get(run.api_version, run.kind, metadata.namespace, metadata.name)
        except Missing as error:
            raise Conflict("making a Job", 404, "Gone", error.message) from error
        self._cache.put(fresh)
        now = fresh["metadata"]
        annotations = now.get("annotations") or {}
        # A new attempt is requested by an annotation, which does not change the generation.
        planned_for = metadata.uid, metadata.generation, metadata.annotations.get(RETRY)
        if (now["uid"], now.get("generation"), annotations.get(RETRY)) != planned_for:
            raise Conflict("making a Job", 409, "Edited", f"{run.kind} {metadata.name} was changed since it was looked at")

    def _is_settled(self, manifest: Manifest, live: Manifest) -> bool:
        """Whether it is as we applied it: our digest, our labels, and not changed by others since.

        The evidence is what this process saw after it applied it; after a restart, a generation of 1 or, for kinds without generations, a
        comparison. Otherwise the object is applied once more, and the API server writes nothing if that changes nothing. Kueue's changes to
        a Job in a queue are accepted.
        """
        metadata, stated = live["metadata"], manifest["metadata"]
        if (metadata.get("annotations") or {}).get(APPLIED) != digest(manifest) or not _holds(metadata.get("labels"), stated["labels"]):
            return False
        if self._settled.get(metadata["uid"]) == _version(live) or _in_a_queue(live):
            return True
        return metadata["generation"] == 1 if "generation" in metadata else _holds(live, manifest)


def _in_a_queue(live: Manifest) -> bool:
    """Whether Kueue decides where and when a Job runs: it adds nodes and tolerations to the template next to ours, in fields that have one
    owner for all of their entries, and the API server accepts no other values for a running Job."""
    return live["kind"] == "Job" and QUEUE in (live["metadata"].get("labels") or {})


def _without_template(manifest: Manifest) -> Manifest:
    return {**manifest, "spec": {name: part for name, part in manifest["spec"].items() if name != "template"}}


def digest(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def _holds(live: Any, stated: Any) -> bool:
    """Whether something is as stated; what is not stated, such as defaults, may be anything."""
    if isinstance(stated, Mapping):
        return isinstance(live, Mapping) and all(name in live and _holds(live[name], part) for name, part in stated.items())
    if isinstance(stated, list):
        return isinstance(live, list) and len(live) == len(stated) and all(map(_holds, live, stated))
    return bool(live == stated)


def _stamped(manifest: Manifest, live: Manifest | None) -> Manifest:
    metadata = dict(manifest["metadata"])
    metadata["annotations"] = {**(metadata.get("annotations") or {}), APPLIED: digest(manifest)}
    if live is not None:
        metadata["uid"] = live["metadata"]["uid"]
    return {**manifest, "metadata": metadata}


def _version(live: Manifest) -> int | str:
    """Return a version that changes with an object's desired state; for kinds without a generation, with every change."""
    version: int | str = live["metadata"].get("generation") or live["metadata"]["resourceVersion"]
    return version


def _may_touch(run: DAggerRun, manifest: Manifest, live: Manifest) -> bool:
    if controller(manifest) is not None:
        return is_own(run, live)
    return (live["metadata"].get("labels") or {}).get(MANAGED_BY) == MANAGED_BY_VALUE and run_key(live) == run_key(manifest)


def _refusal(kind: str, namespace: str, name: str, error: ApiError) -> Trouble:
    if not error.about_one:
        raise error
    log.info("refused", kind=kind, namespace=namespace, name=name, reason=error.reason, message=error.message)
    return Trouble(error.reason or "Refused", f"{kind} {name}: {shortened(error.message)}", datetime.now(UTC))


def _taken(live: Manifest) -> Trouble:
    metadata, owner = live["metadata"], controller(live)
    whose = f"belongs to {owner['kind']} {owner['name']} (uid {owner['uid']})" if owner else "was made by somebody else"
    leaving = ", and is being deleted" if metadata.get("deletionTimestamp") else ": delete it, or rename the run"
    return Trouble("NameTaken", f"{live['kind']} {metadata['name']} in namespace {metadata.get('namespace')} {whose}{leaving}")
