"""The sign that a worker is alive: a Lease in the sandbox namespace that it renews, and that owns its pods.

A Lease that was not renewed for its duration is deleted by an observer, another worker of the run or the operator; the garbage collector
then deletes the pods.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import structlog

from dagger_operator.kube.api import Manifest
from dagger_operator.kube.errors import ApiError, Unavailable
from dagger_operator.sandbox.interface import SandboxError
from dagger_operator.sandbox.kube import Kind, Kube
from dagger_operator.sandbox.pod_manifest import Setting

DURATION_SECONDS = 60
"""Duration of a worker's Lease; a longer one is not accepted, since its author may have been a model's command."""
_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


def lease_of(setting: Setting, now: datetime, duration: int = DURATION_SECONDS) -> Manifest:
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": setting.lease_name, "labels": setting.labels},
        "spec": {"holderIdentity": setting.worker, "leaseDurationSeconds": duration, "renewTime": now.strftime(_FORMAT)},
    }


class Witness:
    """Observes all Leases at intervals, and detects those that nobody renews.

    No other machine's clock is trusted: what counts is how long a Lease did not change while we observed it. An observation that comes
    late restarts the wait: while the API server was unavailable to us, others could not renew either.
    """

    def __init__(self, pace: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`pace`: seconds between observations."""
        self._late, self._clock = 2 * pace, clock
        self._looked = 0.0
        self._seen: dict[str, tuple[str, float]] = {}
        """Of the existing Leases: the version, and since when."""

    def dead(self, leases: Iterable[Manifest], *, grace: float = 0.0) -> list[Manifest]:
        """Observe all existing Leases; return those unchanged for longer than their duration plus `grace` (seconds)."""
        now, before, leases = self._clock(), self._seen, list(leases)
        if now - self._looked > self._late:
            before = {}
        self._looked, self._seen = now, {}
        for lease in leases:
            uid, version = lease["metadata"]["uid"], lease["metadata"]["resourceVersion"]
            known = before.get(uid)
            self._seen[uid] = known if known and known[0] == version else (version, now)
        return [lease for lease in leases if now - self._seen[lease["metadata"]["uid"]][1] > _duration(lease) + grace]


def _duration(lease: Mapping[str, Any]) -> float:
    return float(min((lease.get("spec") or {}).get("leaseDurationSeconds") or DURATION_SECONDS, DURATION_SECONDS))


class WorkerLease:
    """This worker's Lease, and the deletion of its siblings' Leases that nobody renews."""

    def __init__(self, kube: Kube, setting: Setting, duration: int = DURATION_SECONDS) -> None:
        self._kube, self._setting, self._duration = kube, setting, duration
        self._pace = duration / 6
        self._witness = Witness(self._pace)
        self.manifest: Manifest = {}
        """As stored in the API server: the owner of new pods."""

    async def take(self) -> None:
        """Create it; one that exists is from an earlier life of this pod, and is deleted with its sandboxes. Raises `SandboxError`."""
        for pause in (0.2, 0.5, 1.0, 2.0, 4.0, None):
            try:
                self.manifest = await self._kube.create(Kind.LEASES, lease_of(self._setting, datetime.now(UTC), self._duration))
                return
            except ApiError as error:
                if error.reason == "AlreadyExists":
                    with suppress(ApiError):
                        await self._kube.delete(Kind.LEASES, await self._kube.get(Kind.LEASES, self._setting.lease_name))
                elif not isinstance(error, Unavailable) or pause is None:
                    raise SandboxError(
                        error.reason, f"namespace {self._kube.namespace}: no Lease for this worker: {error.message}"
                    ) from error
                if pause is not None:
                    await asyncio.sleep(pause)
        raise SandboxError("LeaseTaken", f"Lease {self._setting.lease_name} in {self._kube.namespace} cannot be replaced")

    async def keep(self) -> None:
        """Renew it and sweep, forever. If it was deleted all the same, its pods are gone, and a new one is created for future pods."""
        while True:
            await asyncio.sleep(self._pace)
            try:
                await self._renew()
                await self.sweep()
            except (ApiError, SandboxError) as error:
                structlog.get_logger().warning("the Lease of this worker could not be renewed", problem=str(error))

    async def _renew(self) -> None:
        spec = {**self.manifest["spec"], "renewTime": datetime.now(UTC).strftime(_FORMAT)}
        try:
            self.manifest = await self._kube.replace(Kind.LEASES, {**self.manifest, "spec": spec})
        except ApiError as error:
            if error.code == 404:
                await self.take()
            elif error.code == 409:
                self.manifest = await self._kube.get(Kind.LEASES, self._setting.lease_name)
            else:
                raise

    async def sweep(self) -> None:
        """Observe this run's Leases and delete those of dead workers; the resourceVersion ensures that none is deleted that was renewed
        meanwhile. The first observation, at the start, only begins the wait."""
        leases, _ = await self._kube.list(Kind.LEASES, self._setting.run_selector)
        for lease in self._witness.dead(leases):
            if lease["metadata"]["uid"] != self.manifest["metadata"]["uid"]:
                structlog.get_logger().info("removing what a dead worker left", lease=lease["metadata"]["name"])
                await self._kube.delete(Kind.LEASES, lease, "resourceVersion")

    async def give_up(self) -> None:
        """Delete it; if that fails, it expires."""
        with suppress(ApiError):
            await self._kube.delete(Kind.LEASES, self.manifest)
