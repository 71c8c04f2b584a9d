"""Makes what should exist exist, and what should go go; asks the API server for nothing that would change nothing."""

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
        """Why the API server did not take it; None where the object is as it should be, or by a `dry_run` could be.

        `Conflict` passes, and `Unavailable` where no object would fare better: then it is to be looked at again.
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
                    return None  # once it is gone there is an event, and a new one is made
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
        """In the foreground: it stays until its pods are gone. Another object of the same name is left alone (`Conflict`).

        Why the API server does not remove it, as `apply` says it.
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
        """An object is gone."""
        self._settled.pop(uid, None)

    async def _found(self, manifest: Manifest) -> Manifest | None:
        """Looked at once more before something is made: the cache may be behind, and a name may be taken by what wears no label."""
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
        """That a run is as it was planned for; else `Conflict`. Of two that work at once the one who hears late of an edit would make a Job
        again that the other has removed for it, beside the one that took its place."""
        metadata = run.metadata
        try:
            fresh = await self._client.get(run.api_version, run.kind, metadata.namespace, metadata.name)
        except Missing as error:
            raise Conflict("making a Job", 404, "Gone", error.message) from error
        self._cache.put(fresh)
        now = fresh["metadata"]
        annotations = now.get("annotations") or {}
        # A new attempt is asked for by an annotation, which counts in no generation.
        planned_for = metadata.uid, metadata.generation, metadata.annotations.get(RETRY)
        if (now["uid"], now.get("generation"), annotations.get(RETRY)) != planned_for:
            raise Conflict("making a Job", 409, "Edited", f"{run.kind} {metadata.name} was changed since it was looked at")

    def _is_settled(self, manifest: Manifest, live: Manifest) -> bool:
        """Whether it is as we applied it: our digest, our labels, and not changed by others since.

        What this process saw after it applied says so. After a restart a generation of 1 does, or, of kinds that do not count
        generations, a comparison. What was changed is applied once more then, and the API server writes nothing where that
        changes nothing. A Job in a queue is changed by Kueue, and rightly.
        """
        metadata, stated = live["metadata"], manifest["metadata"]
        if (metadata.get("annotations") or {}).get(APPLIED) != digest(manifest) or not _holds(metadata.get("labels"), stated["labels"]):
            return False
        if self._settled.get(metadata["uid"]) == _version(live) or _in_a_queue(live):
            return True
        return metadata["generation"] == 1 if "generation" in metadata else _holds(live, manifest)


def _in_a_queue(live: Manifest) -> bool:
    """Whether Kueue decides where a Job runs and when: it puts nodes and tolerations into its template beside ours, in fields that have one
    owner for all of their entries, and of a Job at work the API server takes no other ones."""
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
    """Changes with what an object should be; of kinds that do not count that, with everything."""
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
