"""An operator that is asked to stop before it leads: as the first process of its container, as in a pod."""

import asyncio
import itertools
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
from aiohttp import web

from fixtures.first_process import FIRST, importing

Json = dict[str, Any]


class Server:
    """An API server with a Lease, which `holder` holds and renews all the time; a write takes effect at once and is answered late."""

    def __init__(self, holder: str) -> None:
        self.holder, self.written = holder, list[str]()
        self.reads = itertools.count(1)
        self.asked, self.writing = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/apis/dagger-operator.dev/v1alpha1", _served("DAggerRun", "daggerruns"))
        app.router.add_get("/apis/coordination.k8s.io/v1", _served("Lease", "leases"))
        place = "/apis/coordination.k8s.io/v1/namespaces/lab/leases/dagger-operator"
        app.router.add_get(place, self._read)
        app.router.add_put(place, self._write)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _read(self, _: web.Request) -> web.Response:
        self.asked.set()
        metadata = {"name": "dagger-operator", "namespace": "lab", "resourceVersion": str(next(self.reads))}
        spec = {"holderIdentity": self.holder, "leaseDurationSeconds": 15}
        return web.json_response({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec})

    async def _write(self, request: web.Request) -> web.Response:
        self.holder = (await request.json())["spec"]["holderIdentity"]
        self.written.append(self.holder)
        self.writing.set()
        if self.holder:
            await asyncio.sleep(600)
        return web.json_response({})


def _served(kind: str, plural: str) -> Callable[[web.Request], Any]:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"resources": [{"kind": kind, "name": plural}]})

    return answer


@asynccontextmanager
async def operator(folder: Path, url: str, **environ: str) -> AsyncIterator[asyncio.subprocess.Process]:
    cluster, context = {"name": "c", "cluster": {"server": url}}, {"name": "c", "context": {"cluster": "c", "user": "u"}}
    config = {"clusters": [cluster], "contexts": [context], "users": [{"name": "u", "user": {}}], "current-context": "c"}
    (folder / "kubeconfig").write_text(json.dumps(config))
    settings = {"NAMESPACE": "lab", "HEALTH_PORT": "0", "METRICS_PORT": "0"}
    given = {f"DAGGER_OPERATOR_{name}": value for name, value in settings.items()}
    environ = {**os.environ, "KUBECONFIG": str(folder / "kubeconfig"), **given, **environ}
    process = await asyncio.create_subprocess_exec(
        *FIRST, sys.executable, "-m", "dagger_operator.cluster", env=environ, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def stopped(process: asyncio.subprocess.Process) -> int:
    """How it ends once it is asked to."""
    (one,) = psutil.Process(process.pid).children()
    one.terminate()
    async with asyncio.timeout(10):
        return await process.wait()


async def test_a_standby_stops_when_it_is_asked_to_and_takes_no_lease_any_more(tmp_path: Path) -> None:
    server = Server(holder="another")
    async with server.running() as url, operator(tmp_path, url) as process:
        async with asyncio.timeout(60):
            await server.asked.wait()
        assert await stopped(process) == 0
        assert server.written == []


async def test_one_that_is_just_taking_the_lease_gives_it_back(tmp_path: Path) -> None:
    server = Server(holder="")
    async with server.running() as url, operator(tmp_path, url) as process:
        async with asyncio.timeout(60):
            await server.writing.wait()
        assert await stopped(process) == 0
        assert (len(server.written), server.holder) == (2, "")


async def test_one_that_still_imports_stops_too(tmp_path: Path) -> None:
    async with operator(tmp_path, "http://127.0.0.1:1", PYTHONPATH=importing(tmp_path)) as process:
        assert process.stdout is not None and await process.stdout.readline() == b"importing\n"
        assert await stopped(process) == 0
