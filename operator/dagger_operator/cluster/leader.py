"""Leader election: one replica works at a time, by a Lease.

Another replica takes over once the holder has not renewed for `duration`, measured by its own clock from when it saw the last renewal, so
clocks need not agree. The holder stops writing when it could not renew for `deadline`, which is shorter: `fence` is called before every
write, and `keep` raises, which ends the process. A restarted process begins with what it observes.

The Lease is renewed by a thread with its own connection: a thousand runs created at once keep the loop busy for longer than a Lease lasts,
and that is no reason to restart. A stuck loop is found by the liveness probe.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import structlog

from dagger_operator.cluster.client import Client
from dagger_operator.kube.errors import ApiError, Conflict, Missing, Unavailable

log = structlog.get_logger()

_API, _KIND = "coordination.k8s.io/v1", "Lease"


class LeadershipLost(Exception):
    """Another replica may be working: this process has to end."""


@dataclass
class Leader:
    client: Client
    """Not fenced: the fence depends on the Lease."""
    connect: Callable[[], AbstractAsyncContextManager[Client]]
    """Opens another such client, for another event loop."""
    namespace: str
    name: str
    identity: str
    """Identifies this run of this process: a restarted replica is a different one."""
    duration: float = 15.0
    """Seconds after which others may take over from a holder that does not renew."""
    deadline: float = 10.0
    """Seconds after which a holder that cannot renew gives up."""
    retry: float = 2.0
    clock: Callable[[], float] = time.monotonic
    _seen: tuple[str, float] = ("", 0.0)
    """Version of another holder's Lease, and when it was first seen."""
    _renewed: float | None = field(default=None)

    @property
    def holds(self) -> bool:
        return self._renewed is not None and self.clock() - self._renewed < self.deadline

    def fence(self) -> float:
        """Return the seconds for which this process may write, counted from its last renewal. Raises `LeadershipLost` if they are over,
        however busy it was meanwhile."""
        left = 0.0 if self._renewed is None else self._renewed + self.deadline - self.clock()
        if left <= 0:
            raise LeadershipLost(f"Lease {self.namespace}/{self.name} was not renewed for {self.deadline:.0f} s")
        return left

    async def acquire(self) -> None:
        """Return once this process holds the Lease. Waits while the API server is unavailable; raises `Refused`."""
        while not await self._tried(self.client):  # noqa: ASYNC110 - the wait is for a change in the cluster
            await asyncio.sleep(self.retry)
        log.info("leading", lease=f"{self.namespace}/{self.name}", identity=self.identity)

    async def keep(self) -> None:
        """Renew forever. Raises `LeadershipLost`."""
        ended = threading.Event()
        renewing = asyncio.ensure_future(asyncio.to_thread(lambda: asyncio.run(self._renewing(ended))))
        try:
            await asyncio.shield(renewing)
        finally:
            ended.set()
            await asyncio.wait({renewing})  # otherwise it may renew what is being released

    async def _renewing(self, ended: threading.Event) -> None:
        async with self.connect() as client:
            while not ended.wait(self.retry):
                if not await self._tried(client):
                    self.fence()

    async def release(self) -> None:
        """Let another replica take over at once; a failure does not matter, since the Lease expires.

        Looks at a Lease that was never acquired too: whoever is told to stop while acquiring it may have been given it.
        """
        if self._renewed is not None and not self.holds:
            return
        self._renewed = None
        try:
            async with asyncio.timeout(self.deadline / 2):
                lease = await self.client.get(_API, _KIND, self.namespace, self.name)
                if (lease.get("spec") or {}).get("holderIdentity") == self.identity:
                    await self.client.replace({**lease, "spec": {**lease["spec"], "holderIdentity": ""}})
        except (ApiError, TimeoutError) as error:
            log.debug("lease not released", error=repr(error))

    async def _tried(self, client: Client) -> bool:
        """Take or renew the Lease if possible. Returns False if not now."""
        began = self.clock()
        try:
            async with asyncio.timeout(self.deadline / 2):
                if not await self._written(client):
                    return False
        except (Unavailable, Conflict, TimeoutError) as error:
            log.debug("lease", error=repr(error))
            return False
        self._renewed = began
        return True

    async def _written(self, client: Client) -> bool:
        try:
            lease = await client.get(_API, _KIND, self.namespace, self.name)
        except Missing:
            await client.create(self._claimed({}))
            return True
        if not self._free(lease):
            return False
        await client.replace({**lease, "spec": self._claimed(lease["spec"])["spec"]})
        return True

    def _free(self, lease: dict[str, Any]) -> bool:
        spec, version = lease.get("spec") or {}, lease["metadata"]["resourceVersion"]
        if spec.get("holderIdentity") in (self.identity, "", None):
            return True
        if self._seen[0] != version:
            self._seen = (version, self.clock())
        return self.clock() - self._seen[1] >= float(spec.get("leaseDurationSeconds") or self.duration)

    def _claimed(self, spec: dict[str, Any]) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = spec.get("holderIdentity") == self.identity
        return {
            "apiVersion": _API,
            "kind": _KIND,
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": int(self.duration),
                "acquireTime": spec.get("acquireTime") if mine else now,
                "renewTime": now,
                "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (0 if mine else 1),
            },
        }
