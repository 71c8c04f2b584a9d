"""Sandboxes to test: of processes, of the pods' helper alone, and of pods on the test cluster."""

import asyncio
import secrets
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path
from typing import Self

import aiohttp
import pytest

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.helper_line import HelperLine, Network, Routes
from dagger_operator.sandbox.interface import Sandbox, SandboxProvider, SandboxRequest
from dagger_operator.sandbox.isolation import Isolation, probe
from dagger_operator.sandbox.pod_sandbox import PodSandbox
from dagger_operator.sandbox.pods import PodSandboxes
from dagger_operator.sandbox.process import ProcessSandboxes
from dagger_operator.sandbox.process_sandbox import ProcessSandbox
from fixtures.sandboxes import LIMITS, Nap


def isolations() -> dict[str, Isolation]:
    """Every way in which this machine can hold sandboxes with namespaces."""
    best = probe()
    if not best.bubblewrap:
        return {}
    found = {"sampling": probe(cgroups=False)}
    return {"cgroups": best, **found} if best.cgroups else found


_ISOLATIONS = isolations()


@pytest.fixture
async def provider(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ProcessSandboxes]:
    """The best that this machine has; tests of limits ask for each way by name."""
    if not _ISOLATIONS:
        pytest.skip(f"no namespaces here: {probe().reason}")
    name = getattr(request, "param", next(iter(_ISOLATIONS)))
    if name not in _ISOLATIONS:
        pytest.skip("control groups cannot be made here")
    async with ProcessSandboxes(LIMITS, tmp_path / "sandboxes", isolation=_ISOLATIONS[name]) as provider:
        yield provider


@pytest.fixture
async def sandbox(provider: ProcessSandboxes) -> ProcessSandbox:
    return await provider.create(SandboxRequest("one"), timeout=60)


@pytest.fixture
async def plain(tmp_path: Path) -> AsyncIterator[ProcessSandboxes]:
    isolation = Isolation(bubblewrap=None, reason="the test forbids it", cgroups=None, root=probe().root)
    async with ProcessSandboxes(LIMITS, tmp_path / "plain", allow_unconfined=True, isolation=isolation) as provider:
        yield provider


@pytest.fixture
def nap() -> Nap:
    return Nap()


class HelperAlone:
    """A provider of such sandboxes."""

    def __init__(self, program: Path, limits: SandboxLimits) -> None:
        self._program, self._limits, self._open = program, limits, AsyncExitStack()
        self.port, self._token = 0, ""

    async def __aenter__(self) -> Self:
        self._http = await self._open.enter_async_context(aiohttp.ClientSession())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def create(self, request: SandboxRequest, *, timeout: float) -> PodSandbox:
        self.port, self._token = _free_port(), secrets.token_hex()
        process = subprocess.Popen(self._command(request, self._token))

        async def end() -> None:
            process.kill()
            await asyncio.to_thread(process.wait)

        self._open.push_async_callback(end)
        sandbox = PodSandbox(request, self._limits, self._line(self.port), asyncio.Future(), end)
        await sandbox.prepare()
        return sandbox

    def rerouted(self, sandbox: PodSandbox, port: int) -> PodSandbox:
        """The sandbox made last, reached through another port."""
        sandbox._line = self._line(port)
        return sandbox

    def _line(self, port: int) -> HelperLine:
        way = Network(self._http, "127.0.0.1", self._token, port)
        return HelperLine("alone", way, way, Routes())

    def _command(self, request: SandboxRequest, token: str) -> list[str]:
        limits = self._limits
        serve = ["serve", f"-listen=127.0.0.1:{self.port}", f"-socket=@sandboxd-{self.port}"]
        serve += [f"-processes={limits.processes}", f"-memory-mib={limits.memory_mib}", f"-file-mib={limits.disk_mib}"]
        if request.network_to is not None:
            serve.append(f"-forward={request.network_to}")
        system = [argument for name in ("bin", "lib", "lib64", "sbin") for argument in ("--symlink", f"usr/{name}", f"/{name}")]
        return [
            *("bwrap", "--die-with-parent", "--unshare-pid", "--as-pid-1", "--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev"),
            *("--ro-bind", "/usr", "/usr", *system, "--tmpfs", "/tmp", "--ro-bind", str(self._program), "/sandboxd"),
            *("--clearenv", "--setenv", "DAGGER_TOKEN_SHA256", sha256(token.encode()).hexdigest(), "/sandboxd", *serve),
        ]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
async def helper(sandboxd: Path) -> AsyncIterator[HelperAlone]:
    if not probe().bubblewrap:
        pytest.skip(f"no namespaces here: {probe().reason}")
    async with HelperAlone(sandboxd, LIMITS) as provider:
        yield provider


BACKENDS = ("process", pytest.param("helper", marks=pytest.mark.heavy), pytest.param("pod", marks=pytest.mark.heavy))


@pytest.fixture(params=BACKENDS)
async def any_provider(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SandboxProvider]:
    """What every kind of sandbox promises is tested on each."""
    if request.param == "process":
        if not _ISOLATIONS:
            pytest.skip(f"no namespaces here: {probe().reason}")
        async with ProcessSandboxes(LIMITS, tmp_path / "sandboxes", isolation=next(iter(_ISOLATIONS.values()))) as processes:
            yield processes
    elif request.param == "helper":
        async with HelperAlone(request.getfixturevalue("sandboxd"), LIMITS) as helper:
            yield helper
    else:
        make: Callable[..., PodSandboxes] = request.getfixturevalue("pods")
        async with make() as pods:
            yield pods


@pytest.fixture
async def any_sandbox(any_provider: SandboxProvider) -> AsyncIterator[Sandbox]:
    sandbox = await any_provider.create(SandboxRequest("one"), timeout=120)
    yield sandbox
    await sandbox.close()
