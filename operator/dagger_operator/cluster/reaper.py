"""Removes what no owner reference can clean up in the sandbox namespace: Leases and bindings of runs that are gone, Leases of workers that
are gone, and bindings of accounts that are gone.

Sandbox pods belong to their worker's Lease, so the garbage collector removes them with it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import structlog

from dagger_operator.api import API_VERSION, KIND
from dagger_operator.cluster.cache import Cache, Id, RunKey, identity, run_key
from dagger_operator.cluster.client import Client
from dagger_operator.cluster.leader import LeadershipLost
from dagger_operator.control import MANAGED_BY, MANAGED_BY_VALUE
from dagger_operator.kube.api import Manifest
from dagger_operator.kube.errors import ApiError, Conflict, Missing
from dagger_operator.sandbox.worker_lease import Witness

log = structlog.get_logger()

EVERY = 60.0
"""Seconds between two rounds."""
GRACE = 60.0
"""Seconds beyond its duration after which an unrenewed Lease is removed: its worker is gone, and no sibling removed it."""


class Reaper:
    def __init__(
        self, namespace: str, cache: Cache, client: Client, wake: Callable[[RunKey], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._namespace, self._cache, self._client, self._wake = namespace, cache, client, wake
        self._witness = Witness(EVERY, clock)

    async def run(self) -> None:
        """Reap forever."""
        while True:
            await asyncio.sleep(EVERY)
            try:
                await self.reap()
            except LeadershipLost:
                raise
            except Exception as error:  # workers write there too: whatever they write, the operator goes on
                log.warning("sandbox namespace not cleared", namespace=self._namespace, error=str(error) or repr(error))

    async def reap(self) -> int:
        """Return how many objects were removed; Leases go first, since their pods cost something."""
        leases = [one async for one in self._labelled("coordination.k8s.io/v1", "Lease")]
        dead = self._witness.dead(leases, grace=GRACE)
        removed = [await self._cleared(one) for one in dead]
        removed += [await self._cleared(one, key) for one in leases if one not in dead and (key := run_key(one)) is not None]
        bindings = [one async for one in self._labelled("rbac.authorization.k8s.io/v1", "RoleBinding")]
        self._notice(bindings)
        removed += [await self._cleared(one, key) for one in bindings if (key := run_key(one)) is not None]
        return sum(removed)

    async def _cleared(self, one: Manifest, run: RunKey | None = None) -> bool:
        """Return whether an object was removed; a run's object is not removed before the run, or the account that it binds, is gone. What
        the API server refuses to remove is kept and logged."""
        try:
            return (run is None or await self._is_gone(run) or await self._binds_nobody(one)) and await self._removed(one)
        except ApiError as error:
            if not error.about_one:
                raise
            whose = f"let the operator get DAggerRuns in namespace {run.namespace} and" if run else "let the operator"
            remedy = f"{whose} delete {one['kind']}s in {self._namespace}, or delete it by hand"
            log.warning(
                "not cleared", kind=one["kind"], namespace=self._namespace, name=one["metadata"]["name"], error=str(error), remedy=remedy
            )
            return False

    def _labelled(self, api_version: str, kind: str) -> AsyncIterator[Manifest]:
        return self._client.list(api_version, kind, self._namespace, labelSelector=f"{MANAGED_BY}={MANAGED_BY_VALUE}")

    def _notice(self, bindings: list[Manifest]) -> None:
        """Notice bindings of ours that are gone or were changed, since bindings are not watched, and wake their runs to put them right."""
        there = {one["metadata"]["uid"] for one in bindings}
        for known in [one for one in self._cache.of_kind("RoleBinding") if one["metadata"]["uid"] not in there]:
            if known["metadata"]["namespace"] == self._namespace and (key := self._cache.remove(known)) is not None:
                self._wake(key)
        for one in bindings:
            # One that is not known is read before it is applied.
            if self._cache.get(identity(one)) is not None and (key := self._cache.put(one)) is not None:
                self._wake(key)

    async def _is_gone(self, key: RunKey) -> bool:
        """Whether a run is gone, according to the API server itself: the cache may not know of a run yet."""
        if self._cache.run(key) is not None:
            return False
        try:
            await self._client.get(API_VERSION, KIND, *key)
        except Missing:
            return True
        return False

    async def _binds_nobody(self, one: Manifest) -> bool:
        """Whether it is a binding of an account that is gone, as with the last worker of a stage: whoever creates another account of that
        name would have its rights."""
        account: Manifest = next(iter(one.get("subjects") or ()), {})
        if one["kind"] != "RoleBinding" or account.get("kind") != "ServiceAccount":
            return False
        place = Id(account["kind"], account["namespace"], account["name"])
        if self._cache.get(place) is not None:
            return False
        try:
            await self._client.get("v1", *place)
        except Missing:
            return True
        return False

    async def _removed(self, one: Manifest) -> bool:
        """Return whether an object was removed; not if it changed since it was read: a slow worker may have renewed its Lease."""
        metadata = one["metadata"]
        preconditions = {name: metadata[name] for name in ("uid", "resourceVersion")}
        try:
            await self._client.delete(
                one["apiVersion"], one["kind"], self._namespace, metadata["name"], preconditions=preconditions, propagation="Background"
            )
        except Conflict:
            return False
        log.info("cleared", kind=one["kind"], namespace=self._namespace, name=metadata["name"])
        if self._cache.get(identity(one)) is not None and (key := self._cache.remove(one)) is not None:
            self._wake(key)  # its run may need it again by now
        return True
