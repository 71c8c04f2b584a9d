"""Sandboxes that are pods: created and deleted by a worker, owned by its Lease, followed by one watch."""

import asyncio
import posixpath
import secrets
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType
from typing import Self

import aiohttp
import structlog

from dagger_operator.kube.api import Manifest
from dagger_operator.kube.errors import ApiError, Conflict, Unavailable
from dagger_operator.sandbox import relay
from dagger_operator.sandbox.helper_line import Exec, HelperLine, Network, Routes
from dagger_operator.sandbox.interface import SandboxError, SandboxRequest
from dagger_operator.sandbox.kube import Kind, Kube
from dagger_operator.sandbox.pod_fleet import Life, PodFleet
from dagger_operator.sandbox.pod_manifest import HELPER_PORT, Setting, of_a_worker, pod
from dagger_operator.sandbox.pod_sandbox import PodSandbox
from dagger_operator.sandbox.pod_state import PodState
from dagger_operator.sandbox.worker_lease import DURATION_SECONDS, WorkerLease

_FAILURES_UNNOTICED = 3
_MOST_PAUSE_SECONDS = 30.0
_CONNECT_SECONDS = 3.0
_KNOCK_SECONDS = 0.1


@dataclass
class _Wait:
    """Why a pod could not be created yet; empty if it was not tried."""

    reason: str = ""
    message: str = ""


class PodSandboxes:
    """Creates sandbox pods. Use as an async context manager: leaving it deletes them all; if the process dies, their Lease expires.

    If their upkeep (the Lease, the watch, the sweep) fails unexpectedly, the task that entered the context is cancelled, and leaving it
    raises `SandboxError`.
    """

    def __init__(self, setting: Setting, namespace: str, *, most_alive: int, lease_seconds: int = DURATION_SECONDS) -> None:
        """`most_alive`: pods that may exist at once, including terminating ones."""
        self._setting, self._namespace, self._most_alive, self._lease_seconds = setting, namespace, most_alive, lease_seconds
        self._routes = Routes()
        self._open = AsyncExitStack()
        self._failures = 0

    async def __aenter__(self) -> Self:
        """Raises `SandboxError` if the API server refuses the worker."""
        try:
            async with AsyncExitStack() as opening:
                self._kube = await opening.enter_async_context(Kube.connect(self._namespace))
                self._http = await opening.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
                self._lease = WorkerLease(self._kube, self._setting, self._lease_seconds)
                await self._lease.take()
                opening.push_async_callback(self._lease.give_up)
                self._fleet = PodFleet(self._kube, self._setting.worker_selector, lambda: str(self._lease.manifest["metadata"]["uid"]))
                await self._lease.sweep()
                group = await opening.enter_async_context(asyncio.TaskGroup())
                for work in (self._lease.keep(), self._fleet.follow(), self._fleet.sweep()):
                    opening.callback(group.create_task(work).cancel)
                opening.push_async_callback(self._end_all)
                self._open = opening.pop_all()
        except ApiError as error:
            raise SandboxError(error.reason, f"namespace {self._namespace}: {error.message}") from error
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            await self._open.aclose()
        except ExceptionGroup as failed:
            structlog.get_logger().error("the upkeep of sandboxes broke", exc_info=failed)
            cause = failed.exceptions[0]
            raise SandboxError("Unexpected", f"the upkeep of sandboxes broke: {type(cause).__name__}: {cause}") from failed

    async def _end_all(self) -> None:
        await asyncio.gather(*(self._fleet.end(life) for life in self._fleet.at_rest()))

    async def create(self, request: SandboxRequest, *, timeout: float) -> PodSandbox:
        """Create a pod that is ready for commands; a `SandboxError` has the pod's own reason if there is one."""
        if not request.workdir.startswith("/") or posixpath.normpath(request.workdir) != request.workdir or request.workdir == "/":
            raise SandboxError(
                "InvalidWorkdir", f"workdir {request.workdir!r}: write an absolute path other than / without . and .., such as /testbed"
            )
        if request.network_to is not None:
            relay.parse(request.network_to)
        token = secrets.token_urlsafe(32)
        manifest = pod(self._setting, request, digest=sha256(token.encode()).hexdigest(), owner=self._lease.manifest)
        life: Life | None = None
        wait = _Wait()
        try:
            async with asyncio.timeout(timeout):
                life = await self._begin(manifest, wait)
                sandbox = self._sandbox(request, life, token, await self._answering(life))
                await sandbox.prepare()
            self._failures = 0
            return sandbox
        except BaseException as error:
            if life:
                await self._fleet.end(life)
            if isinstance(error, TimeoutError):
                self._failures += 1
                raise _too_late(request, life.state if life else wait if wait.reason else self._no_room(), timeout) from error
            if isinstance(error, SandboxError):
                self._failures += 1
            raise

    def _sandbox(self, request: SandboxRequest, life: Life, token: str, address: str) -> PodSandbox:
        through_exec = Exec(self._kube, life.pod["metadata"]["name"], token)
        line = HelperLine(request.name, Network(self._http, address, token), through_exec, self._routes)
        return PodSandbox(request, self._setting.limits, line, life.lost, lambda: self._fleet.end(life))

    async def _answering(self, life: Life) -> str:
        """Return the sandbox's address once its helper listens: a kubelet reports that up to a second later, or more if it is busy."""
        ways = [asyncio.create_task(life.ready())]
        if not self._routes.network_closed:
            ways.append(asyncio.create_task(_listening(life.addressed)))
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _begin(self, manifest: Manifest, wait: _Wait) -> Life:
        """Create the pod once there is room for it and, after consecutive failures, after a pause."""
        if self._failures >= _FAILURES_UNNOTICED:
            await asyncio.sleep(min(_MOST_PAUSE_SECONDS, 0.5 * 2 ** min(self._failures - _FAILURES_UNNOTICED, 16)))
        name = manifest["metadata"]["name"]
        await self._fleet.admit(name, self._most_alive)
        try:
            return self._fleet.born(await self._created(manifest, wait))
        finally:
            await self._fleet.dismiss(name)

    def _no_room(self) -> _Wait:
        nodes = ", ".join(self._fleet.ending_on())
        theirs = f"{self._most_alive} pods of this worker" + (f", of which some have yet to end on {nodes}" if nodes else "")
        return _Wait("CreateTimeout", f"no room for it among {theirs}; or the API server does not answer")

    async def _created(self, manifest: Manifest, wait: _Wait) -> Manifest:
        """Create the pod. An existing one of that name was left by an earlier life, or by a request whose answer was lost: delete it."""
        pause = 0.1
        while True:
            try:
                return await self._kube.create(Kind.PODS, manifest)
            except ApiError as error:
                if error.reason == "AlreadyExists":
                    await self._make_way(manifest)
                elif not _passes(error):
                    raise SandboxError(error.reason, f"pod {manifest['metadata']['name']}: {error.message}") from error
                wait.reason, wait.message = error.reason, error.message
            await asyncio.sleep(pause)
            pause = min(2.0, 2 * pause)

    async def _make_way(self, manifest: Manifest) -> None:
        try:
            old = await self._kube.get(Kind.PODS, manifest["metadata"]["name"])
            if not self._may_go(old):
                raise SandboxError(
                    "NameTaken", f"pod {old['metadata']['name']} in {self._namespace} is not this run's: delete or rename it"
                )
            if not old["metadata"].get("deletionTimestamp"):
                await self._kube.delete(Kind.PODS, old)
        except ApiError as error:
            if error.code != 404 and not isinstance(error, Unavailable):
                raise SandboxError(error.reason, f"pod {manifest['metadata']['name']}: {error.message}") from error

    def _may_go(self, old: Manifest) -> bool:
        """Whether a pod is of this run, of any worker."""
        labels = old["metadata"].get("labels") or {}
        ours = {key: value for key, value in self._setting.labels.items() if key != "dagger-operator.dev/worker"}
        return of_a_worker(old) and ours.items() <= labels.items()


async def _listening(address: "asyncio.Future[str]") -> str:
    """Return the address once a connection to the helper's port is accepted there."""
    host = await asyncio.shield(address)
    while True:
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, writer = await asyncio.open_connection(host, HELPER_PORT)
            writer.close()
            return host
        await asyncio.sleep(_KNOCK_SECONDS)


def _passes(error: ApiError) -> bool:
    """Whether the same request may succeed later. Terminating pods count in a quota until they are gone, and concurrent writers of the
    quota's status meet a conflict."""
    return isinstance(error, Unavailable | Conflict) or error.reason == "QuotaExceeded"


def _too_late(request: SandboxRequest, why: PodState | _Wait, timeout: float) -> SandboxError:
    said = f": {why.message}" if why.message else ""
    return SandboxError(why.reason or "CreateTimeout", f"sandbox {request.name} was not ready after {timeout:g} s{said}")
