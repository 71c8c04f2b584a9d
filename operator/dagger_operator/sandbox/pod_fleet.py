"""Tracks the pods of one worker through one watch, and deletes those that are no longer wanted."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import structlog

from dagger_operator.kube.api import Manifest
from dagger_operator.kube.errors import ApiError
from dagger_operator.sandbox.interface import SandboxError
from dagger_operator.sandbox.kube import Kind, Kube
from dagger_operator.sandbox.pod_manifest import of_a_worker
from dagger_operator.sandbox.pod_state import PodState, Stand, state_of

_SWEEP_SECONDS = 5.0
_LOST_AFTER = timedelta(seconds=60)
"""A pod should be gone at its deletionTimestamp, which includes its grace period; if its node is down, nothing reports that."""
PULL_PATIENCE_SECONDS = 60.0
"""How long an image pull may keep failing: a few tries of the kubelet; after that a rollout's slot is worth more."""


class Life:
    """One pod from its creation to its end."""

    def __init__(self, pod: Manifest) -> None:
        self.pod = pod
        self.state = PodState(Stand.COMING, "", "")
        self.lost: asyncio.Future[PodState] = asyncio.get_running_loop().create_future()
        """Done when the pod has ended."""
        self.addressed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The pod's IP address, set as soon as it has one, which is before it is ready."""
        self._changed = asyncio.Event()

    @property
    def uid(self) -> str:
        return str(self.pod["metadata"]["uid"])

    def see(self, state: PodState) -> None:
        self.state = state
        self._changed.set()
        if state.address and not self.addressed.done():
            self.addressed.set_result(state.address)
        if state.stand is Stand.ENDED and not self.lost.done():
            self.lost.set_result(state)

    async def ready(self) -> str:
        """Return the address once commands can be sent there. Raises `SandboxError` if the pod ends first or its image cannot be pulled."""
        stuck_since: float | None = None
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            state = self.state
            if state.stand is Stand.READY:
                return state.address
            if state.stand is Stand.STUCK and stuck_since is None:
                stuck_since = loop.time()
            if state.stand is Stand.ENDED or (stuck_since is not None and loop.time() - stuck_since > PULL_PATIENCE_SECONDS):
                raise SandboxError(state.reason, f"pod {self.pod['metadata']['name']}: {state.message}")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 5.0)


class PodFleet:
    """Tracks all pods of a worker; `owner` returns the uid of its Lease."""

    def __init__(self, kube: Kube, selector: str, owner: Callable[[], str]) -> None:
        self._kube, self._selector, self._owner = kube, selector, owner
        self._known: dict[str, Manifest] = {}
        self._lives: dict[str, Life] = {}
        self._coming: set[str] = set()
        self._leaving: set[str] = set()
        self._fewer = asyncio.Condition()

    async def admit(self, name: str, most: int) -> None:
        """Wait until fewer than `most` pods exist or are being created, then count a new one among them until `dismiss`.

        As in a quota, pods that should be gone by now do not count: their node is down, and may stay so.
        """
        async with self._fewer:
            await self._fewer.wait_for(lambda: self._count() + len(self._coming) < most)
            self._coming.add(name)

    def _count(self) -> int:
        now = datetime.now(UTC)
        return len({uid for uid, pod in self._known.items() if not _lost(pod, now)} | self._lives.keys())

    def ending_on(self) -> list[str]:
        """Return the nodes on which pods are terminating, or which have not reported that they did."""
        ending = (pod for pod in self._known.values() if pod["metadata"].get("deletionTimestamp"))
        return sorted({str(pod["spec"]["nodeName"]) for pod in ending if "nodeName" in pod["spec"]})

    async def dismiss(self, name: str) -> None:
        self._coming.discard(name)
        async with self._fewer:
            self._fewer.notify_all()

    def born(self, pod: Manifest) -> Life:
        """Track a pod as wanted from now on, until `end`."""
        life = Life(pod)
        self._lives[life.uid] = life
        life.see(state_of(self._known.get(life.uid, pod)))
        return life

    async def end(self, life: Life) -> None:
        """Delete a pod. If that fails, it is retried until the pod is gone."""
        if self._lives.pop(life.uid, None):
            self._known.setdefault(life.uid, life.pod)
            await self._remove(life.uid, life.pod)

    def at_rest(self) -> list[Life]:
        return list(self._lives.values())

    async def follow(self) -> None:
        """List, then watch, forever: one connection for all pods of the worker."""
        version, pause = "", 0.5
        while True:
            try:
                if not version:
                    pods, version = await self._kube.list(Kind.PODS, self._selector)
                    await self._see_all(pods)
                async for kind, pod in self._kube.watch(Kind.PODS, self._selector, version):
                    version, pause = pod["metadata"]["resourceVersion"], 0.5
                    if kind != "BOOKMARK":
                        await self._see(pod, gone=kind == "DELETED")
            except ApiError as error:
                if error.code != 410:
                    structlog.get_logger().warning("the watch of sandbox pods broke off", problem=str(error))
                    await asyncio.sleep(pause)
                    pause = min(10.0, 2 * pause)
                version = ""

    async def sweep(self) -> None:
        """Forever delete pods that are ours and not wanted, such as one whose creation was cancelled in flight."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            for uid, pod in list(self._known.items()):
                if self._unwanted(uid, pod["metadata"]):
                    await self._remove(uid, pod)
            async with self._fewer:
                self._fewer.notify_all()  # some count as lost by now, for which there is no event

    async def _remove(self, uid: str, pod: Manifest) -> None:
        """Delete a pod; if it is already gone, forget it: its deletion event may have come before it was known, and does not come again."""
        self._leaving.add(uid)
        try:
            with suppress(ApiError):
                if not await self._kube.delete(Kind.PODS, pod):
                    self._known.pop(uid, None)
                    async with self._fewer:
                        self._fewer.notify_all()
        finally:
            self._leaving.discard(uid)

    def _unwanted(self, uid: str, metadata: Manifest) -> bool:
        ours = any(owner["uid"] == self._owner() for owner in metadata.get("ownerReferences") or ())
        asked = uid in self._leaving or metadata.get("deletionTimestamp")
        return ours and uid not in self._lives and metadata["name"] not in self._coming and not asked

    async def _see_all(self, pods: Iterable[Manifest]) -> None:
        found = {pod["metadata"]["uid"]: pod for pod in pods}
        for uid in self._known.keys() - found.keys():
            await self._see(self._known[uid], gone=True)
        for pod in found.values():
            await self._see(pod, gone=False)

    async def _see(self, pod: Manifest, *, gone: bool) -> None:
        if not of_a_worker(pod):
            return
        uid = pod["metadata"]["uid"]
        if gone:
            self._known.pop(uid, None)
        else:
            self._known[uid] = pod
        if life := self._lives.get(uid):
            state = state_of(pod)
            if gone and state.stand is not Stand.ENDED:
                state = PodState(Stand.ENDED, "PodDeleted", "the pod was deleted")
            life.see(state)
        async with self._fewer:
            self._fewer.notify_all()


def _lost(pod: Manifest, now: datetime) -> bool:
    due = pod["metadata"].get("deletionTimestamp")
    return due is not None and now - datetime.fromisoformat(due) > _LOST_AFTER
