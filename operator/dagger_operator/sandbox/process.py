"""Sandboxes on one machine: a few folders each, and a fresh set of namespaces for every command.

A command runs in its own namespaces rather than in long-lived ones: killing one process ends everything it started, nothing inside can
tamper with later commands, and there is no server to keep alive. It costs 10 to 12 ms of CPU per command, all processes counted
(measured on two busy cores, by cpuacct); half of that is bubblewrap's.
What a command leaves in the background therefore ends with it. Files remain: the working directory, /tmp and $HOME belong to the sandbox.
"""

import asyncio
import itertools
import re
import secrets
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox import filesystem, relay
from dagger_operator.sandbox.interface import SandboxError, SandboxRequest
from dagger_operator.sandbox.isolation import Isolation, probe
from dagger_operator.sandbox.launch import Launcher
from dagger_operator.sandbox.process_sandbox import ProcessSandbox
from dagger_operator.sandbox.tenancy import Tenancy
from dagger_operator.sandbox.usage import ProcessTable

NO_NAMESPACES = "NoNamespaces"
_FIRST_UID, _UIDS = 1_900_000_000, 200_000_000
"""User ids of sandboxes created by root: above those of systems, containers and directory services."""


class ProcessSandboxes:
    """Creates sandboxes of local processes. Use as an async context manager: leaving it removes them all."""

    def __init__(self, limits: SandboxLimits, root: Path, *, allow_unconfined: bool = False, isolation: Isolation | None = None) -> None:
        """`root` is a folder that several providers may share; `isolation` defaults to the best that the machine offers."""
        self._limits = limits
        self._root = root
        self._isolation, self._allow_unconfined = isolation, allow_unconfined
        self._count = itertools.count()
        self._live: set[ProcessSandbox] = set()
        self._open = AsyncExitStack()
        self._ways: set[str] = set()
        self._processes = ProcessTable()

    @property
    def isolation(self) -> Isolation:
        """What confines the sandboxes; known once the context is entered."""
        assert self._isolation is not None, "use the provider as an async context manager"
        return self._isolation

    async def __aenter__(self) -> Self:
        """Raises `SandboxError`, with reason `NoNamespaces` if commands would be plain processes and that is not allowed."""
        if self._isolation is None:
            self._isolation = await asyncio.to_thread(probe)
        if not self._isolation.bubblewrap:
            if not self._allow_unconfined:
                raise SandboxError(NO_NAMESPACES, self._isolation.refusal())
            structlog.get_logger().warning("sandboxes without namespaces", isolation=self._isolation.describe())
        elif not self._isolation.sees_files:
            structlog.get_logger().warning("not all that sandboxes use can be seen", isolation=self._isolation.describe())
        try:
            self._tenancy = await asyncio.to_thread(Tenancy.take, self._root, self._isolation.cgroups)
        except OSError as error:
            raise SandboxError(
                "NoFolder", f"sandboxes cannot be kept in {self._root}: {error.strerror}: name a folder that can be written"
            ) from error
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await asyncio.gather(*(sandbox.close() for sandbox in tuple(self._live)), return_exceptions=True)
        await self._open.aclose()
        await asyncio.to_thread(self._tenancy.give_up)

    async def create(self, request: SandboxRequest, *, timeout: float) -> ProcessSandbox:
        """Create a sandbox; `request.image` is ignored."""
        filesystem.check_workdir(request.workdir)
        if request.network_to is not None:
            relay.parse(request.network_to)
        sandbox: ProcessSandbox | None = None
        try:
            async with asyncio.timeout(timeout):
                launcher = await asyncio.to_thread(self._prepare, request)
                sandbox = ProcessSandbox(request, launcher, self._processes, self._live.discard)
                self._live.add(sandbox)
                if request.network_to is not None and not self.isolation.bubblewrap:
                    await self._way_on_host(request.network_to)
                if request.files:
                    await sandbox.write(request.files)
                return sandbox
        except BaseException as error:
            if sandbox:
                await sandbox.close()
            if isinstance(error, TimeoutError):
                raise SandboxError("CreateTimeout", f"sandbox {request.name} was not ready after {timeout:g} s") from error
            if isinstance(error, OSError):
                raise SandboxError("CannotCreate", f"sandbox {request.name}: {error}") from error
            raise

    def _prepare(self, request: SandboxRequest) -> Launcher:
        name = f"{next(self._count)}-{re.sub('[^A-Za-z0-9.-]+', '-', request.name)[:64]}"
        uid = _FIRST_UID + secrets.randbelow(_UIDS) if self.isolation.bubblewrap and self.isolation.root else None
        folder = self._tenancy.folder / name
        filesystem.prepare(folder, uid)
        groups = self.isolation.cgroups
        cgroup = groups.make(f"{self._tenancy.name}.{name}", self._limits) if groups else None
        return Launcher(self.isolation, self._limits, folder, request.workdir, uid, cgroup)

    async def _way_on_host(self, target: str) -> None:
        """Without namespaces, let commands reach the target's port on 127.0.0.1 too, through one relay for all sandboxes."""
        host, port = relay.parse(target)
        if host not in ("127.0.0.1", "localhost") and target not in self._ways:
            await self._open.enter_async_context(relay.serve(relay.listen_on_host(port), target))
            self._ways.add(target)
