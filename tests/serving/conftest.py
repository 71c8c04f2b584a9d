"""A server that behaves as vLLM does towards its agent, replicas made of it, and Hugging Face folders small enough to look at."""

import asyncio
import contextlib
import json
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from multidict import CIMultiDictProxy

from dagger_operator.api import DAggerRun, load
from dagger_operator.serving.engine import Engine
from dagger_operator.serving.gate import Gate
from dagger_operator.serving.metrics import AgentMetrics
from dagger_operator.serving.proxy import Proxy
from dagger_operator.serving.replica import Replica, Weights
from dagger_operator.serving.shared import Shared
from dagger_operator.store.objects import Store
from dagger_operator.store.stage import Stage


class Connections:
    """Of one server: those that asyncio accepts while it ends, too, which aiohttp would forget and never close. One that stays keeps the
    socket's path bound."""

    def __init__(self, server: Any) -> None:
        self._transports: list[asyncio.Transport] = []
        self._ended = False
        self._told = server.connection_made
        server.connection_made = self._made

    def _made(self, handler: Any, transport: asyncio.Transport) -> None:
        self._transports.append(transport)
        self._told(handler, transport)
        if self._ended:
            transport.abort()

    def end(self) -> None:
        self._ended = True
        for transport in self._transports:
            transport.abort()


class FakeVllm:
    """vLLM's development and chat endpoints on a Unix socket, with its habits: it loads `current` when it starts, keeps a prefix cache
    of what its weights computed, holds requests back while paused, and is lost after a failed reload.

    An answer's content names the weights that made it. `faults` lists what goes wrong at which endpoint: `error`, `crash`, `stale`.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.faults: list[tuple[str, str]] = []
        self.calls: Counter[str] = Counter()
        self.starts = 0
        self.turn_seconds = 0.0
        self.reported_tokens = 7
        self.finish_reason = "stop"
        self.packs = False
        """As on the CPU: it shows no weights that a version changes."""
        self.headers: list[CIMultiDictProxy[str]] = []
        self._runner: web.AppRunner | None = None
        self._connections: Connections
        self._death: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        return self._runner is not None

    @property
    def gone(self) -> bool:
        """Nothing of the process is left but the socket's file."""
        return not self.up and (self._death is None or self._death.done())

    async def start(self) -> None:
        assert not self.shared.socket.exists(), "vLLM cannot bind where a socket was left behind"
        self.weights = (self.shared.root / "current" / "weights").read_text()
        self.label, self.dead, self.cache = "default", False, dict[str, str]()
        self.running = asyncio.Event()
        self.running.set()
        app = web.Application(middlewares=[self._faulty])
        app.router.add_get("/health", self._health)
        app.router.add_get("/weight_info", self._weight_info)
        app.router.add_post("/update_weight_version", self._set_label)
        app.router.add_post("/pause", self._pause)
        app.router.add_post("/resume", self._resume)
        app.router.add_post("/collective_rpc", self._reload)
        app.router.add_post("/reset_prefix_cache", self._reset)
        app.router.add_post("/weight_checker", self._checksums)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        self._connections = Connections(self._runner.server)
        await web.UnixSite(self._runner, str(self.shared.socket)).start()
        self.starts += 1

    async def crash(self) -> None:
        """As SIGKILL ends it: connections break, the socket stays behind."""
        # In a task of its own: the handler that crashes is among what ends.
        if self._death is None or self._death.done():
            self._death = asyncio.create_task(self._die())
        await asyncio.shield(self._death)

    async def _die(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            # First nobody is accepted any more, then those that were get their transport: asyncio forgets them once the server is closed.
            for site in list(runner.sites):
                for listening in site._server.sockets:
                    asyncio.get_running_loop().remove_reader(listening.fileno())
            for _ in range(5):
                await asyncio.sleep(0)
            for site in list(runner.sites):
                await site.stop()
            self._connections.end()
            await runner.cleanup()
            self.shared.socket.touch()

    @web.middleware
    async def _faulty(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        self.calls[request.path] += 1
        fault = next((fault for path, fault in self.faults if path == request.path), None)
        if fault is not None:
            self.faults.remove((request.path, fault))
        if fault == "crash":
            await self.crash()
        if fault == "error":
            self.dead = self.dead or request.path == "/collective_rpc"
            return web.json_response({"error": {"message": "injected"}}, status=500)
        if fault == "stale":
            return web.json_response({"results": [None]})
        return await handler(request)

    async def _weight_info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.label})

    async def _checksums(self, _: web.Request) -> web.Response:
        return web.json_response({"checksums": {"all": "norms" if self.packs else self.weights}})

    async def _tokenize(self, _: web.Request) -> web.Response:
        return web.json_response({"count": 7})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "policy", "root": "/a/folder", "max_model_len": 2048}]})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text="vllm:num_requests_running 0\n")

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=503 if self.dead else 200)

    async def _set_label(self, request: web.Request) -> web.Response:
        self.label = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def _pause(self, _: web.Request) -> web.Response:
        self.running.clear()
        return web.json_response({"status": "paused"})

    async def _resume(self, _: web.Request) -> web.Response:
        self.running.set()
        return web.json_response({"status": "resumed"})

    async def _reload(self, request: web.Request) -> web.Response:
        call = await request.json()
        if call["method"] == "repack_tied_head":
            return web.json_response({"results": [True]})
        path = Path(call["kwargs"]["weights_path"])
        try:
            self.weights = (path / "weights").read_text()
        except OSError as error:
            self.dead = True
            return web.json_response({"error": {"message": str(error)}}, status=500)
        return web.json_response({"results": [None]})

    async def _reset(self, _: web.Request) -> web.Response:
        self.cache.clear()
        return web.json_response({"success": True})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(request.headers)
        body = await request.json()
        if body["model"] != "policy":
            return web.json_response({"error": {"message": "unknown", "code": 404}}, status=404)
        await self.running.wait()
        if self.dead:
            return web.json_response({"error": {"message": "EngineDeadError"}}, status=500)
        prompt = json.dumps(body["messages"])
        began = self.cache.setdefault(prompt, self.weights)
        if body.get("stream"):
            return await self._stream(request, began)
        await asyncio.sleep(self.turn_seconds)
        made_by = sorted({began, self.weights})
        choice = {"index": 0, "message": {"role": "assistant", "content": " ".join(made_by)}, "finish_reason": self.finish_reason}
        usage = {"prompt_tokens": self.reported_tokens}
        return _compact({"id": "1", "object": "chat.completion", "model": "policy", "choices": [choice], "usage": usage})

    async def _stream(self, request: web.Request, made_by: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in ("a", "b", made_by):
            event = f'{{"id":"1","model":"policy","choices":[{{"index":0,"delta":{{"content":{json.dumps(piece)}}}}}]}}'
            await response.write(f"data: {event}\n\n".encode())
            await asyncio.sleep(self.turn_seconds)
        await response.write(b"data: [DONE]\n\n")
        return response


def _compact(answer: dict[str, Any]) -> web.Response:
    """As vLLM writes JSON: without spaces."""
    return web.json_response(answer, dumps=lambda value: json.dumps(value, separators=(",", ":")))


class Pod:
    """A replica with its agent in front of a fake vLLM, and what a kubelet does for the vLLM container."""

    def __init__(self, root: Path, first: str = "r000-aaaaaaaaaaaa") -> None:
        self.shared = Shared(root)
        self.vllm = FakeVllm(self.shared)
        self.target: str | None = first
        self.store_error: Exception | None = None
        self.disk_full = False
        for version in (first, "r001-bbbbbbbbbbbb", "r002-cccccccccccc", "r003-dddddddddddd"):
            self.add(version)
        self.shared.point(first)

    def add(self, version: str) -> None:
        folder = self.shared.folder(version)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text(version)

    async def _wanted(self) -> str | None:
        if self.store_error is not None:
            raise self.store_error
        return self.target

    async def _provide(self, version: str) -> Weights:
        if self.disk_full:
            raise OSError(28, "No space left on device")
        self.add(version)
        return Weights(version, digest=f"digest of {version}", tensors=frozenset({version}))

    @contextlib.asynccontextmanager
    async def agent(self) -> AsyncIterator["Pod"]:
        """The agent's life; vLLM's is another."""
        self.gate = Gate()
        self.metrics = AgentMetrics(self.gate)
        self.engine = engine = Engine(self.shared.socket, slow_seconds=20, repacks=self.vllm.packs)
        self.replica = Replica(
            self.engine, self.shared, self.gate, self.metrics, wanted=self._wanted, provide=self._provide, drain_seconds=20
        )
        app = Proxy(self.engine, self.gate, self.replica, self.metrics).application()
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()
            await engine.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Pod"]:
        """Agent and vLLM, both up and converged."""
        await self.vllm.start()
        try:
            async with self.agent():
                await self.replica.step()
                yield self
        finally:
            await self.vllm.crash()
            self.shared.socket.unlink(missing_ok=True)

    async def kubelet(self) -> None:
        """One look: a server that is gone is started, one whose liveness probe fails is restarted."""
        if self.vllm.up and self.replica.state == "Starting" and not await self.replica.server_well():
            await self.vllm.crash()
        if self.vllm.gone and not self.shared.socket.exists():
            await self.vllm.start()

    async def settle(self, *, looks: int = 300) -> None:
        """Steps, with a kubelet beside, until what should be served is."""
        for _ in range(looks):
            await self.replica.step()
            await self.kubelet()
            if self.replica.state == "Serving" and self.gate.version == self.target:
                return
            await asyncio.sleep(0.01)
        bound = [line for line in Path("/proc/net/unix").read_text().splitlines() if line.endswith(str(self.shared.socket))]
        raise AssertionError(
            f"does not converge: {self.replica.state} {self.gate.version} {self.replica.reason}; vLLM is up: {self.vllm.up}, gone: "
            f"{self.vllm.gone}, its socket there: {self.shared.socket.exists()}, bound by {bound}"
        )


@pytest.fixture
def pod(socket_folder: Path) -> Pod:
    return Pod(socket_folder)


@pytest.fixture
def make_pod(socket_folder: Path) -> Callable[[], Pod]:
    """A fresh pod for each call: a property is tried many times in one test."""
    numbers = iter(range(10**6))
    return lambda: Pod(socket_folder / str(next(numbers)))


@pytest.fixture
def socket_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a short path, as Unix sockets need."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="dgr-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def tiny_folder(folder: Path, **without: bool) -> Path:
    """A Hugging Face folder in form: config, tokenizer, chat template, and one tensor in safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 2048}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


@pytest.fixture
def document(tmp_path: Path, model: Path) -> dict[str, Any]:
    """A run in a local folder, served student, teacher behind an endpoint."""
    source = {"type": "JSONL", "uri": "tasks.jsonl"}
    return {
        "apiVersion": "dagger-operator.dev/v1alpha1",
        "kind": "DAggerRun",
        "metadata": {"name": "a-run"},
        "spec": {
            "student": {
                "model": str(model),
                "sampling": {"maxTokens": 64},
                "serving": {"gpus": 0, "maxModelLen": 2048, "toolCallParser": "hermes", "startupDeadlineSeconds": 10},
            },
            "teacher": {"model": "teach", "sampling": {"maxTokens": 64}, "endpoint": {"url": "http://127.0.0.1:9/v1"}},
            "tasks": {"source": source, "heldOut": {"source": source}},
            "storage": {"url": f"file://{tmp_path}/store"},
        },
    }


@pytest.fixture
def stage(document: dict[str, Any], tmp_path: Path) -> Callable[..., Stage]:
    """A stage of that run."""

    def make(*, round: int = 0, policy: str = "", **environ: str) -> Stage:
        run: DAggerRun = load(document)
        return Stage(
            run=run,
            round=round,
            index=0,
            worker="tester",
            policy=policy,
            scratch=tmp_path / "scratch",
            store=Store.open(run.spec.storage),
            environ=environ,
        )

    return make
