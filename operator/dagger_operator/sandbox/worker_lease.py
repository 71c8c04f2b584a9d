"""What says that a worker lives: a Lease in the sandbox namespace that it renews, and that owns its pods.

A Lease that was not renewed for its duration is removed by whoever comes across it, another worker of the run or the operator; then
the garbage collector removes the pods.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from dagger_operator.kube.api import Manifest
from dagger_operator.kube.errors import ApiError, Unavailable
from dagger_operator.sandbox.interface import SandboxError
from dagger_operator.sandbox.kube import Kind, Kube
from dagger_operator.sandbox.pod_manifest import Setting

DURATION_SECONDS = 60
_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


def lease_of(setting: Setting, now: datetime, duration: int = DURATION_SECONDS) -> Manifest:
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": setting.lease_name, "labels": setting.labels},
        "spec": {"holderIdentity": setting.worker, "leaseDurationSeconds": duration, "renewTime": now.strftime(_FORMAT)},
    }


def expired(lease: Mapping[str, Any], now: datetime) -> bool:
    """Whether a Lease was not renewed for as long as it says; one that does not say when is as old as it is."""
    spec = lease.get("spec") or {}
    try:
        renewed = datetime.fromisoformat(spec.get("renewTime") or spec.get("acquireTime") or lease["metadata"]["creationTimestamp"])
        return renewed + timedelta(seconds=spec.get("leaseDurationSeconds") or 0) < now
    except (KeyError, TypeError, ValueError):
        return True


class WorkerLease:
    """This worker's Lease, and the sweeping up of its siblings' that expired."""

    def __init__(self, kube: Kube, setting: Setting, duration: int = DURATION_SECONDS) -> None:
        self._kube, self._setting, self._duration = kube, setting, duration
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
            await asyncio.sleep(self._duration / 6)
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
        """Removes Leases of this run that expired; the resourceVersion sees to it that none is removed that was renewed meanwhile."""
        leases, _ = await self._kube.list(Kind.LEASES, self._setting.run_selector)
        for lease in leases:
            if expired(lease, datetime.now(UTC)) and lease["metadata"]["uid"] != self.manifest["metadata"]["uid"]:
                structlog.get_logger().info("removing what a dead worker left", lease=lease["metadata"]["name"])
                await self._kube.delete(Kind.LEASES, lease, "resourceVersion")

    async def give_up(self) -> None:
        """Deletes it; where that fails it expires."""
        with suppress(ApiError):
            await self._kube.delete(Kind.LEASES, self.manifest)
