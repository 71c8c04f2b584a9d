"""Sandboxes to test: of processes, of the pods' helper alone, and of pods on the test cluster."""

import asyncio
import importlib.machinery
import importlib.util
import json
import os
import secrets
import socket
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import aiohttp
import psutil
import pytest

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.helper_line import HelperLine, Network, Routes
from dagger_operator.sandbox.interface import Sandbox, SandboxProvider, SandboxRequest
from dagger_operator.sandbox.isolation import Isolation, probe
from dagger_operator.sandbox.pod_manifest import Setting
from dagger_operator.sandbox.pod_sandbox import PodSandbox
from dagger_operator.sandbox.pods import PodSandboxes
from dagger_operator.sandbox.process import ProcessSandboxes
from dagger_operator.sandbox.process_sandbox import ProcessSandbox

ROOT = Path(__file__).resolve().parents[2]

LIMITS = SandboxLimits(memory_mib=256, disk_mib=24, processes=48, output_kib=64)


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
    async with ProcessSandboxes(LIMITS, tmp_path / "plain", isolation=isolation) as provider:
        yield provider


@pytest.fixture
def alive() -> Callable[[str], int]:
    """How many processes of the machine carry a mark in their command line."""

    def count(mark: str) -> int:
        return sum(1 for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or ()))

    return count


def build_sandboxd() -> Path:
    """The static program, built at its first use of these sources on this machine."""
    loader = importlib.machinery.SourceFileLoader("build_tool", str(ROOT / "scripts" / "build-tool"))
    spec = importlib.util.spec_from_loader("build_tool", loader)
    assert spec is not None
    tool: Any = importlib.util.module_from_spec(spec)
    loader.exec_module(tool)
    source = ROOT / "images" / "sandboxd"
    digest = sha256(b"".join(file.read_bytes() for file in sorted(source.glob("*")))).hexdigest()[:12]
    program = Path(tool.cache()) / f"sandboxd-{digest}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        partial = program.with_suffix(f".{os.getpid()}")
        environ = {"HOME": str(program.parent), **os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}
        command = [tool.find_go(("1", "19"), program.parent), "build", "-trimpath", "-ldflags", "-s -w", "-o", str(partial), "."]
        subprocess.run(command, cwd=source, env=environ, check=True)
        partial.rename(program)
    return program


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


@pytest.fixture(scope="session")
def sandboxd() -> Path:
    return build_sandboxd()


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


@pytest.fixture(scope="session")
def sandbox_image(cluster: Any, sandboxd: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image on the cluster's node that is helper and sandbox in one: bash with its libraries, busybox, sandboxd."""
    if image := os.environ.get("DAGGER_TEST_SANDBOX_IMAGE"):
        return image  # elsewhere it has to be brought there by other means
    archive = tmp_path_factory.mktemp("image") / "image.tar"
    name = f"localhost/sandbox:{sandboxd.name.removeprefix('sandboxd-')}"
    archive.write_bytes(image_archive(name, sandboxd))
    subprocess.run([ROOT / "tests" / "cluster" / "load", archive], check=True, stdout=subprocess.DEVNULL)
    return name


def image_archive(name: str, sandboxd: Path) -> bytes:
    """A Docker archive with one layer."""
    bash, busybox = Path("/bin/bash"), Path("/bin/busybox")
    layer = BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in ("bin", "tmp", "root"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777
            tar.addfile(entry)
        libraries = subprocess.run(["ldd", bash], capture_output=True, text=True, check=True).stdout.split()
        for file in {bash, busybox, *(Path(word) for word in libraries if word.startswith("/"))}:
            tar.add(file.resolve(), str(file).lstrip("/"))
        tar.add(sandboxd, "opt/dagger/sandboxd")
        applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
        for applet in set(applets) - {"bash", "busybox"}:
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "/bin/busybox"
            tar.addfile(entry)
    content = layer.getvalue()
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    config = {"architecture": architecture, "os": "linux", "config": {"Env": ["PATH=/bin", "IMAGE=its own"]}}
    config |= {"rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(content).hexdigest()}"]}}
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        texts = {"manifest.json": json.dumps(manifest).encode(), "config.json": json.dumps(config).encode()}
        for path, data in {**texts, "layer.tar": content}.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, BytesIO(data))
    return packed.getvalue()


@pytest.fixture
def pods(cluster: Any, namespace: str, sandbox_image: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PodSandboxes]:
    """Makes providers in a namespace of the test's own; every argument of a `Setting` may be given."""
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))

    def make(*, most_alive: int = 8, lease_seconds: int = 60, **setting: Any) -> PodSandboxes:
        usual = {"run": "one", "run_namespace": "team", "worker": "rollout-0", "life": secrets.token_hex(4), "limits": LIMITS}
        usual |= {"helper_image": sandbox_image, "image": sandbox_image, "lifetime_seconds": 900}
        return PodSandboxes(Setting(**{**usual, **setting}), namespace, most_alive=most_alive, lease_seconds=lease_seconds)

    return make
