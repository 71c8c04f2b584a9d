"""What says that a worker lives: a Lease in the sandbox namespace that it renews, and that owns its pods.

A Lease that stood still for its duration is removed by whoever looked on, another worker of the run or the operator; then the garbage
collector removes the pods.
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
"""For how long a worker's Lease lasts; one that says that it lasts longer is not believed, since whoever wrote it may have been the
commands of a model."""
_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


def lease_of(setting: Setting, now: datetime, duration: int = DURATION_SECONDS) -> Manifest:
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": setting.lease_name, "labels": setting.labels},
        "spec": {"holderIdentity": setting.worker, "leaseDurationSeconds": duration, "renewTime": now.strftime(_FORMAT)},
    }


class Witness:
    """Who looks at all Leases again and again, and can tell which of them nobody renews.

    No clock of another machine is trusted: what counts is how long a Lease did not change before our eyes. A look that comes late begins
    anew: while we could not look, for the API server was away, others could not renew either.
    """

    def __init__(self, pace: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`pace`: seconds from one look to the next."""
        self._late, self._clock = 2 * pace, clock
        self._looked = 0.0
        self._seen: dict[str, tuple[str, float]] = {}
        """Of the Leases that there are: version, and since when."""

    def dead(self, leases: Iterable[Manifest], *, grace: float = 0.0) -> list[Manifest]:
        """One look at all that there are; those of them that stood still for longer than they last, and `grace` (seconds)."""
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
    """This worker's Lease, and the sweeping up of its siblings' that nobody renews."""

    def __init__(self, kube: Kube, setting: Setting, duration: int = DURATION_SECONDS) -> None:
        self._kube, self._setting, self._duration = kube, setting, duration
        self._pace = duration / 6
        self._witness = Witness(self._pace)
        self.manifest: Manifest = {}
        """As the API server has it: the owner of new pods."""

    async def take(self) -> None:
        """Creates it; one of the same name is an earlier life's of this pod, and goes with its sandboxes. Raises `SandboxError`."""
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
        """Renews it and sweeps, for ever. Where it was removed all the same its pods are gone, and a new one is made for those to come."""
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
        """Looks at the Leases of this run, and removes those of the dead; their version sees to it that none is removed that was renewed
        meanwhile. The first look, at the start, only begins the wait."""
        leases, _ = await self._kube.list(Kind.LEASES, self._setting.run_selector)
        for lease in self._witness.dead(leases):
            if lease["metadata"]["uid"] != self.manifest["metadata"]["uid"]:
                structlog.get_logger().info("removing what a dead worker left", lease=lease["metadata"]["name"])
                await self._kube.delete(Kind.LEASES, lease, "resourceVersion")

    async def give_up(self) -> None:
        """Deletes it; where that fails it expires."""
        with suppress(ApiError):
            await self._kube.delete(Kind.LEASES, self.manifest)
